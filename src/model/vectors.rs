//! Files with a matrix of floats, one vector per row, in the format of NumPy or of safetensors. Rows are read a piece at a
//! time and never mapped, for the reasons that [`super::weights`] gives.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;

use super::store::Source;
use super::weights::{convert, header};

/// Why a file of vectors cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {message}")]
pub struct VectorsError {
    pub file: String,
    pub message: String,
}

/// The names of such files end with one of these.
pub const EXTENSIONS: [&str; 2] = ["npy", "safetensors"];

/// An open file of vectors.
pub struct VectorFile {
    name: String,
    source: Source,
    dtype: Dtype,
    /// Of the first row's first byte.
    offset: u64,
    pub rows: usize,
    /// Values of a vector.
    pub width: usize,
    /// The rows' numbers in a tensor `ids` of safetensors.
    pub ids: Option<Vec<i64>>,
}

/// Whether a file's name says that it holds vectors.
pub fn is_file_of_vectors(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension))
}

impl VectorFile {
    /// Reads the file's header.
    ///
    /// # Errors
    /// It is not in the format that its name says, its length does not fit its header, or it holds something other than
    /// one matrix of f32, f16 or, in safetensors, bf16.
    pub fn open(path: &Path) -> Result<Self, VectorsError> {
        let name = path.display().to_string();
        let failed = |message: String| VectorsError { file: name.clone(), message };
        let source = Source::File(File::open(path).map_err(|error| failed(error.to_string()))?);
        let opened = match path.extension().is_some_and(|extension| extension == "npy") {
            true => numpy(&source),
            false => safetensors(&source),
        };
        let Matrix { dtype, offset, shape: [rows, width], ids } = opened.map_err(failed)?;
        if rows == 0 || width == 0 {
            return Err(failed(format!("its shape is [{rows}, {width}]: it holds no vectors")));
        }
        Ok(Self { dtype, offset, rows, width, ids, source, name })
    }

    /// The values of some rows, one row after the other.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(&self, rows: Range<usize>) -> Result<Vec<f32>, VectorsError> {
        let (source, count) = (&self.source, rows.len() * self.width);
        let offset = self.offset + (rows.start * self.width * self.dtype.bitsize() / 8) as u64;
        let read = match self.dtype {
            Dtype::F16 => convert(source, offset, count, |x| f16::from_le_bytes(x).to_f32()),
            Dtype::BF16 => convert(source, offset, count, |x| bf16::from_le_bytes(x).to_f32()),
            _ => convert(source, offset, count, f32::from_le_bytes),
        };
        read.map_err(|error| VectorsError { file: self.name.clone(), message: error.to_string() })
    }
}

/// What a header says.
#[derive(Debug)]
struct Matrix {
    dtype: Dtype,
    offset: u64,
    shape: [usize; 2],
    ids: Option<Vec<i64>>,
}

/// The one matrix of floats in a safetensors file, and a tensor `ids` of integers, if there is one.
fn safetensors(source: &Source) -> Result<Matrix, String> {
    let (metadata, start) =
        header(source).map_err(|reason| format!("it is not a safetensors file: {reason}"))?;
    let tensors = metadata.tensors();
    let is_float = |dtype: Dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let mut matrices = tensors.iter().filter(|(_, info)| info.shape.len() == 2 && is_float(info.dtype));
    let (Some((_, info)), None) = (matrices.next(), matrices.next()) else {
        let mut all: Vec<String> =
            tensors.iter().map(|(name, info)| format!("{name} {:?} {:?}", info.dtype, info.shape)).collect();
        all.sort();
        return Err(format!(
            "it needs exactly one matrix of F32, F16 or BF16, with a vector per row; it has: {}",
            all.join(", ")
        ));
    };
    let at = |offset: usize| start + offset as u64;
    let shape = [info.shape[0], info.shape[1]];
    let ids = match tensors.get("ids") {
        None => None,
        Some(ids) => {
            if ids.shape != [shape[0]] {
                let message =
                    format!("the shape of ids is {:?}, but there are {} vectors", ids.shape, shape[0]);
                return Err(message);
            }
            Some(integers(source, ids.dtype, at(ids.data_offsets.0), shape[0])?)
        }
    };
    Ok(Matrix { dtype: info.dtype, offset: at(info.data_offsets.0), shape, ids })
}

fn integers(source: &Source, dtype: Dtype, offset: u64, count: usize) -> Result<Vec<i64>, String> {
    let mut bytes = vec![0; count * dtype.bitsize() / 8];
    source.read_at(offset, &mut bytes).map_err(|error| error.to_string())?;
    let (fours, eights) = (bytes.as_chunks::<4>().0, bytes.as_chunks::<8>().0);
    match dtype {
        Dtype::I64 => Ok(eights.iter().map(|&x| i64::from_le_bytes(x)).collect()),
        Dtype::I32 => Ok(fours.iter().map(|&x| i64::from(i32::from_le_bytes(x))).collect()),
        Dtype::U32 => Ok(fours.iter().map(|&x| i64::from(u32::from_le_bytes(x))).collect()),
        other => Err(format!("ids are {other:?}; supported: I64, I32, U32")),
    }
}

/// The matrix in a file of NumPy (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).
fn numpy(source: &Source) -> Result<Matrix, String> {
    const MAGIC: &[u8] = b"\x93NUMPY";
    let text = |error: std::io::Error| error.to_string();
    let size = source.len().map_err(text)?;
    let mut start = [0; 12];
    if size < start.len() as u64 {
        return Err("it is not a file of NumPy: it is too short".to_owned());
    }
    source.read_at(0, &mut start).map_err(text)?;
    if !start.starts_with(MAGIC) {
        return Err("it is not a file of NumPy: it does not begin with \\x93NUMPY".to_owned());
    }
    // The first version has a length of two bytes, the others of four.
    let [.., a, b, c, d] = start;
    let (length, at) = match start[6] {
        1 => (u64::from(u16::from_le_bytes([a, b])), 10),
        2 | 3 => (u64::from(u32::from_le_bytes([a, b, c, d])), 12),
        other => {
            return Err(format!("version {other} of NumPy's format is not supported; supported: 1 to 3"));
        }
    };
    let offset = at + length;
    if offset > size {
        return Err("its header is longer than the file".to_owned());
    }
    let mut header = vec![0; length as usize];
    source.read_at(at, &mut header).map_err(text)?;
    let header = String::from_utf8_lossy(&header);
    // A Python literal: {'descr': '<f4', 'fortran_order': False, 'shape': (1000, 384), }
    let value = |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
    let dtype = value("descr").and_then(|rest| rest.split('\'').nth(1)).unwrap_or_default();
    let dtype = match dtype {
        "<f4" => Dtype::F32,
        "<f2" => Dtype::F16,
        other => {
            return Err(format!("its values are {other:?}; supported: <f4 and <f2 (float32 and float16)"));
        }
    };
    if !value("fortran_order").is_some_and(|rest| rest.starts_with("False")) {
        return Err(
            "its rows are not consecutive (fortran_order); save numpy.ascontiguousarray of it".to_owned()
        );
    }
    let shape =
        value("shape").and_then(|rest| rest.strip_prefix('(')?.split_once(')')).map(|(shape, _)| shape);
    let sizes = shape.unwrap_or_default().split(',').map(str::trim).filter(|size| !size.is_empty());
    let sizes: Vec<usize> = sizes.map_while(|size| size.parse().ok()).collect();
    let Ok(shape) = <[usize; 2]>::try_from(sizes) else {
        return Err(format!("its shape is ({}); supported: two dimensions", shape.unwrap_or_default()));
    };
    let needs = shape[0].checked_mul(shape[1]).and_then(|count| count.checked_mul(dtype.bitsize() / 8));
    let needs = needs.map_or(u64::MAX, |bytes| bytes as u64).saturating_add(offset);
    if size != needs {
        return Err(format!("it has {size} bytes, but its header needs {needs}: was it cut short?"));
    }
    Ok(Matrix { dtype, offset, shape, ids: None })
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    fn written(name: &str, bytes: &[u8]) -> (tempfile::TempDir, Result<VectorFile, String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let opened = VectorFile::open(&path).map_err(|error| error.to_string());
        (folder, opened)
    }

    fn npy(version: u8, header: &str, values: &[u8]) -> Vec<u8> {
        let length = header.len() as u32;
        let mut bytes = [b"\x93NUMPY", &[version, 0][..]].concat();
        match version {
            1 => bytes.extend(&length.to_le_bytes()[..2]),
            _ => bytes.extend(length.to_le_bytes()),
        }
        bytes.extend(header.as_bytes());
        bytes.extend(values);
        bytes
    }

    const VALUES: [f32; 6] = [1.0, -2.0, 0.5, 3.0, 0.25, -8.0];

    fn halves(of: fn(f32) -> [u8; 2]) -> Vec<u8> {
        VALUES.iter().flat_map(|&x| of(x)).collect()
    }

    fn floats() -> Vec<u8> {
        VALUES.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    #[test]
    fn matrices_of_numpy_are_read() {
        let header =
            |descr: &str| format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (2, 3), }}   \n");
        for (version, descr, values) in [
            (1, "<f4", floats()),
            (2, "<f4", floats()),
            (1, "<f2", halves(|x| f16::from_f32(x).to_le_bytes())),
        ] {
            let (_folder, file) = written("x.npy", &npy(version, &header(descr), &values));
            let file = file.unwrap();
            assert_eq!((file.rows, file.width), (2, 3));
            assert_eq!(file.read(0..2).unwrap(), VALUES);
            assert_eq!(file.read(1..2).unwrap(), VALUES[3..]);
        }
        for (bytes, part) in [
            (npy(1, &header("<f8"), &[0; 48]), "\"<f8\"; supported: <f4 and <f2"),
            (npy(1, &header("<f4"), &[0; 20]), "was it cut short?"),
            (npy(1, "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", &[0; 24]), "fortran_order"),
            (npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }", &[0; 24]), "shape is (6,)"),
            (npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3), }", &[]), "no vectors"),
            (npy(7, "", &[0; 9]), "version 7"),
            (b"[[1, 2], [3, 4]]".to_vec(), "does not begin"),
            (b"\x93NUMPY".to_vec(), "too short"),
        ] {
            let (_folder, file) = written("x.npy", &bytes);
            let error = file.err().unwrap();
            assert!(error.contains(part) && error.contains("x.npy: "), "{error}");
        }
    }

    #[test]
    fn matrices_of_safetensors_are_read() {
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let (wide, half) = (floats(), halves(|x| bf16::from_f32(x).to_le_bytes()));
        let ids: Vec<u8> = [7i64, -1].iter().flat_map(|x| x.to_le_bytes()).collect();
        for (dtype, values) in [(Dtype::F32, &wide), (Dtype::BF16, &half)] {
            let tensors = [("x", view(dtype, &[2, 3], values)), ("ids", view(Dtype::I64, &[2], &ids))];
            let (_folder, file) = written("x.safetensors", &safetensors::serialize(tensors, None).unwrap());
            let file = file.unwrap();
            assert_eq!(file.read(0..2).unwrap(), VALUES);
            assert_eq!(file.ids, Some(vec![7, -1]));
        }
        let two = [("a", view(Dtype::F32, &[2, 3], &wide)), ("b", view(Dtype::F32, &[3, 2], &wide))];
        let short = [("a", view(Dtype::F32, &[2, 3], &wide)), ("ids", view(Dtype::I64, &[1], &ids[..8]))];
        let wrong = [("a", view(Dtype::F32, &[2, 3], &wide)), ("ids", view(Dtype::F32, &[2], &wide[..8]))];
        for (tensors, part) in [
            (two.to_vec(), "it has: a F32 [2, 3], b F32 [3, 2]"),
            (short.to_vec(), "the shape of ids is [1], but there are 2 vectors"),
            (wrong.to_vec(), "ids are F32"),
        ] {
            let (_folder, file) = written("x.safetensors", &safetensors::serialize(tensors, None).unwrap());
            let error = file.err().unwrap();
            assert!(error.contains(part), "{error}");
        }
        let (_folder, file) = written("x.safetensors", b"nothing of the kind");
        assert!(file.err().unwrap().contains("not a safetensors file"));
    }
}
