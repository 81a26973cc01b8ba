//! With the feature `cuda`, compiles the fused operations (src/model/ops/cuda/kernels.cu) to PTX.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    kernels();
}

#[cfg(feature = "cuda")]
fn kernels() {
    const SOURCE: &str = "src/model/ops/cuda/kernels.cu";
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=src/model/ops/cuda/device.h");
    cudaforge::KernelBuilder::new()
        .source_files([SOURCE])
        .args(["-std=c++17", "-O3"])
        .build_ptx()
        .expect("nvcc compiles the kernels");
}
