//! The tests that KANDLE_TEST_DEVICE moves to a GPU, in one binary, because what is carried to a machine with a GPU should
//! be small (scripts/gpu-check.sh). Some are test binaries of their own too.

#[path = "../embeddings.rs"]
mod embeddings;
#[path = "../gliner.rs"]
mod gliner;
#[path = "../golden.rs"]
mod golden;
mod precision;
#[path = "../sparse.rs"]
mod sparse;
#[path = "../support"]
mod support {
    pub mod models;
}
#[path = "../tasks.rs"]
mod tasks;
mod wide;
