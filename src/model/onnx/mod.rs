//! ONNX models: any graph that tract evaluates, with kandle's own operators for trees and categories.
//!
//! ```text
//! graph        the file: inputs, outputs, classes; what is rewritten for tract
//! unsupported  operators that nobody has
//! ml           the operators of ai.onnx.ml
//! tensors      items and answers
//! model        tract's plan, and batches along the first axis
//! ```

mod graph;
mod ml;
mod model;
mod tensors;
mod unsupported;

pub use graph::{Dim, Graph, GraphError, Output, Port, type_name};
pub use model::{Computed, OnnxError, OnnxModel, external_files, read};
pub use tensors::{Cell, Cells, Layout, Tensors};
pub use tract_onnx::tract_hir::internal::DatumType;
