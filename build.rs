//! With the feature `cuda`, compiles the GPU kernels (src/model/kernels/cuda/kernels.cu) to PTX.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    const SOURCE: &str = "src/model/kernels/cuda/kernels.cu";
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=src/model/kernels/cuda/device.h");
    cudaforge::KernelBuilder::new()
        .source_files([SOURCE])
        .args(["-std=c++17", "-O3"])
        .build_ptx()
        .expect("cannot compile kernels.cu with nvcc; the feature `cuda` needs the CUDA toolkit");
}
