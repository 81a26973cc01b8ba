//! With the feature `cuda`, compiles the GPU kernels (src/cuda/kernels.cu) to PTX.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    let file = |name: &str| format!("src/cuda/{name}");
    cudaforge::KernelBuilder::new()
        .source_files([file("kernels.cu")])
        .watch(["attention.h", "device.h", "disentangled.h", "elements.h", "rows.h"].map(file))
        .args(["-std=c++17", "-O3"])
        .build_ptx()
        .expect("cannot compile kernels.cu with nvcc; the feature `cuda` needs the CUDA toolkit");
}
