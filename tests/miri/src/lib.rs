//! The modules of kandle that `make miri` runs, from their own files.
#![allow(dead_code, unused_imports)]

#[path = "../../../src/model/kernels/mod.rs"]
mod kernels;
