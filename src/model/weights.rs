//! Weights in safetensors files or PyTorch's own, read one tensor at a time, straight into its final memory: loading a
//! model needs little more memory than the model itself.
//!
//! PyTorch's files hold pickles, which Candle's reader interprets: it builds values, and never runs code that a pickle
//! names. A file is a zip file, or has the form before zip files ([`legacy`]).
//!
//! Tensors are read with positioned reads and not through a memory map: mapped pages count as the process's memory, and
//! truncating a mapped file kills the process (SIGBUS).

mod legacy;

use std::collections::HashMap;

use candle_core::pickle::PthTensors;
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::store::{Files, FilesError, Source};

/// Why weights cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error("{file}: not a safetensors file: {reason}")]
    Header { file: String, reason: String },
    #[error(
        "{file}: not a file of weights that kandle reads ({reason}); convert it with Python in the model's directory: \
         import torch, safetensors.torch as s; w = torch.load('{file}', weights_only=True, map_location='cpu'); \
         s.save_file({{k: v.clone().contiguous() for k, v in w.items()}}, 'model.safetensors')"
    )]
    Pickle { file: String, reason: String },
}

/// The longest header, in bytes, as the safetensors library limits it.
const MAX_HEADER: u64 = 100_000_000;
/// Bytes of a file that are converted at once.
const PIECE: usize = 1 << 20;

/// The tensors of all files by name. Files are either all safetensors or all pickles.
#[derive(Default)]
pub struct Weights {
    files: Vec<(String, Source)>,
    pickles: Vec<(String, PthTensors)>,
    tensors: HashMap<String, Entry>,
}

struct Entry {
    place: Place,
    shape: Vec<usize>,
}

/// Where a tensor is. `file`: index into [`Weights::files`] or [`Weights::pickles`].
enum Place {
    /// `offset`: of the tensor's first byte.
    Bytes {
        file: usize,
        offset: u64,
        dtype: Dtype,
        /// How many elements each dimension's next index is apart; `None` if there are no gaps, and the last
        /// dimension's elements are neighbours.
        strides: Option<Vec<usize>>,
    },
    Pickled {
        file: usize,
        name: String,
        dtype: DType,
    },
}

impl Entry {
    fn is_float(&self) -> bool {
        match &self.place {
            Place::Bytes { dtype, .. } => {
                matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
            }
            Place::Pickled { dtype, .. } => dtype.is_float(),
        }
    }
}

/// The name that today's checkpoints have for a tensor: early ones of BERT call a norm's tensors gamma and beta.
fn modern(name: &str) -> String {
    match (name.strip_suffix("LayerNorm.gamma"), name.strip_suffix("LayerNorm.beta")) {
        (Some(start), _) => format!("{start}LayerNorm.weight"),
        (_, Some(start)) => format!("{start}LayerNorm.bias"),
        (None, None) => name.to_owned(),
    }
}

impl Weights {
    /// Reads the headers of all files with weights.
    ///
    /// # Errors
    /// There are no weights, or a file has an invalid header or another length than its header says.
    pub fn open(files: &Files) -> std::result::Result<Self, WeightsError> {
        let mut all = Self::default();
        for name in files.weights()? {
            all.add(name, files)?;
        }
        Ok(all)
    }

    /// Reads the header of one file with weights, as [`Weights::open`] does.
    pub fn open_file(files: &Files, name: String) -> std::result::Result<Self, WeightsError> {
        let mut all = Self::default();
        all.add(name, files)?;
        Ok(all)
    }

    fn add(&mut self, name: String, files: &Files) -> std::result::Result<(), WeightsError> {
        let source = files.open(&name)?;
        match name.ends_with(".safetensors") {
            true => self.add_safetensors(name, source),
            false if legacy::is_legacy(&source).is_ok_and(|is| is) => self.add_legacy(name, source),
            false => self.add_pickle(name, files),
        }
    }

    /// A tensor under today's name never replaces one that has it in the file.
    fn insert(&mut self, name: &str, entry: Entry) {
        let modern = modern(name);
        if modern == name || !self.tensors.contains_key(&modern) {
            self.tensors.insert(modern, entry);
        }
    }

    fn add_safetensors(&mut self, file: String, source: Source) -> std::result::Result<(), WeightsError> {
        let (metadata, start) =
            header(&source).map_err(|reason| WeightsError::Header { file: file.clone(), reason })?;
        for (name, TensorInfo { dtype, shape, data_offsets }) in metadata.tensors() {
            let offset = start + data_offsets.0 as u64;
            let place = Place::Bytes { file: self.files.len(), offset, dtype: *dtype, strides: None };
            self.insert(&name, Entry { place, shape: shape.clone() });
        }
        self.files.push((file, source));
        Ok(())
    }

    fn add_legacy(&mut self, file: String, source: Source) -> std::result::Result<(), WeightsError> {
        // Candle's reader panics on some malformed pickles.
        let read = std::panic::catch_unwind(|| legacy::read(&source));
        let read = read.unwrap_or_else(|_| Err("it is malformed".to_owned()));
        let tensors = match read {
            Ok(tensors) if tensors.is_empty() => Err("it holds no tensors by name".to_owned()),
            other => other,
        };
        let tensors = tensors.map_err(|reason| WeightsError::Pickle { file: file.clone(), reason })?;
        for legacy::Stored { name, dtype, shape, offset, strides } in tensors {
            let strides = (!is_contiguous(&shape, &strides)).then_some(strides);
            let place = Place::Bytes { file: self.files.len(), offset, dtype, strides };
            self.insert(&name, Entry { place, shape });
        }
        self.files.push((file, source));
        Ok(())
    }

    fn add_pickle(&mut self, file: String, files: &Files) -> std::result::Result<(), WeightsError> {
        let failed = |reason: String| WeightsError::Pickle { file: file.clone(), reason };
        let path = files.path(&file).ok_or_else(|| failed("it is not on a disk".to_owned()))?;
        // Candle's reader panics on some malformed pickles.
        let read = std::panic::catch_unwind(|| PthTensors::new(path, None));
        let read = read.map_err(|_| failed("it is malformed".to_owned()))?;
        let pickle = read.map_err(|error| failed(super::message(&error)))?;
        if pickle.tensor_infos().is_empty() {
            return Err(failed("it holds no tensors by name".to_owned()));
        }
        for (name, info) in pickle.tensor_infos() {
            let place = Place::Pickled { file: self.pickles.len(), name: name.clone(), dtype: info.dtype };
            self.insert(name, Entry { place, shape: info.layout.dims().to_vec() });
        }
        self.pickles.push((file, pickle));
        Ok(())
    }

    /// Number of elements in all floating-point tensors.
    pub fn parameters(&self) -> usize {
        self.parameters_of(|_| true)
    }

    /// Like [`Weights::parameters`], of the tensors with these names.
    pub fn parameters_of(&self, is_one: impl Fn(&str) -> bool) -> usize {
        let ones = self.tensors.iter().filter(|(name, entry)| entry.is_float() && is_one(name));
        ones.map(|(_, entry)| entry.shape.iter().product::<usize>()).sum()
    }

    /// The shape of a tensor; `None` if there is none of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        match self.tensors.get(name) {
            Some(entry) => Ok(entry),
            None => candle_core::bail!("cannot find tensor {name}"),
        }
    }

    fn read(&self, name: &str, entry: &Entry, dtype: DType, device: &Device) -> Result<Tensor> {
        let (file, source, offset, stored_dtype, strides) = match &entry.place {
            Place::Bytes { file, offset, dtype, strides } => {
                let (file, source) = &self.files[*file];
                (file, source, *offset, *dtype, strides)
            }
            Place::Pickled { file, name, .. } => {
                let (file, pickle) = &self.pickles[*file];
                let part = pickle.tensor_infos().get(name).is_some_and(|info| info.layout.start_offset() > 0);
                if part {
                    candle_core::bail!("{file}: {name} is a part of another tensor, which is not supported");
                }
                let tensor = pickle.get(name)?;
                let Some(tensor) = tensor else { candle_core::bail!("{file}: cannot find tensor {name}") };
                return floats_as(dtype, &tensor.contiguous()?.to_device(device)?);
            }
        };
        let failed = |error: std::io::Error| candle_core::Error::Msg(format!("{file}: {name}: {error}"));
        let count = entry.shape.iter().product::<usize>();
        let stored = DType::try_from(stored_dtype)?;
        if let Some(strides) = strides {
            let bytes =
                gather(source, offset, stored.size_in_bytes(), &entry.shape, strides).map_err(failed)?;
            return floats_as(dtype, &Tensor::from_raw_buffer(&bytes, stored, &entry.shape, device)?);
        }
        if dtype == DType::F32 && device.is_cpu() {
            let floats = match stored_dtype {
                Dtype::F32 => convert(source, offset, count, f32::from_le_bytes),
                Dtype::F16 => convert(source, offset, count, |x| f16::from_le_bytes(x).to_f32()),
                Dtype::BF16 => convert(source, offset, count, |x| bf16::from_le_bytes(x).to_f32()),
                Dtype::F64 => convert(source, offset, count, |x| f64::from_le_bytes(x) as f32),
                other => candle_core::bail!("{file}: {name} is {other:?}; supported: F64, F32, F16, BF16"),
            };
            return Tensor::from_vec(floats.map_err(failed)?, entry.shape.as_slice(), device);
        }
        // The device converts, so that the elements are copied to it once and as stored.
        let mut bytes = vec![0; count * stored.size_in_bytes()];
        source.read_at(offset, &mut bytes).map_err(failed)?;
        floats_as(dtype, &Tensor::from_raw_buffer(&bytes, stored, &entry.shape, device)?)
    }
}

/// A tensor of floats as `dtype`; any other tensor as it is.
fn floats_as(dtype: DType, tensor: &Tensor) -> Result<Tensor> {
    if tensor.dtype().is_float() { tensor.to_dtype(dtype) } else { Ok(tensor.clone()) }
}

impl SimpleBackend for Weights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let entry = self.entry(name)?;
        if shape.dims() != entry.shape {
            candle_core::bail!(
                "shape mismatch for {name}: the file has {:?}, config.json asks for {:?}",
                entry.shape,
                shape.dims()
            );
        }
        self.read(name, entry, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.read(name, self.entry(name)?, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

/// The file's metadata, and the offset of its first tensor. Format: eight bytes of length, that many bytes of JSON
/// (<https://github.com/huggingface/safetensors>, "Format").
pub(super) fn header(source: &Source) -> std::result::Result<(Metadata, u64), String> {
    let text = |error: std::io::Error| error.to_string();
    let mut length = [0; 8];
    source.read_at(0, &mut length).map_err(text)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(format!("its header length of {length} bytes is over the limit"));
    }
    let mut json = vec![0; length as usize];
    source.read_at(8, &mut json).map_err(text)?;
    let metadata: Metadata = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
    let (start, has) = (8 + length, source.len().map_err(text)?);
    let needs = start.saturating_add(metadata.data_len() as u64);
    if has != needs {
        return Err(format!("it has {has} bytes, but its header needs {needs}: was its download cut short?"));
    }
    Ok((metadata, start))
}

/// Whether elements are stored in the order of their indices, without gaps.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut next = 1;
    let mut dimensions = shape.iter().zip(strides).rev();
    shape.contains(&0)
        || dimensions.all(|(&size, &stride)| {
            let fits = size == 1 || stride == next;
            next *= size;
            fits
        })
}

/// Reads elements of `size` bytes that are stored in another order, into the order of their indices. The tensor has
/// elements, and all of them are in the file.
fn gather(
    source: &Source,
    offset: u64,
    size: usize,
    shape: &[usize],
    strides: &[usize],
) -> std::io::Result<Vec<u8>> {
    let last: usize = shape.iter().zip(strides).map(|(size, stride)| (size - 1) * stride).sum();
    let mut stored = vec![0; (last + 1) * size];
    source.read_at(offset, &mut stored)?;
    let count: usize = shape.iter().product();
    let mut ordered = Vec::with_capacity(count * size);
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    for _ in 0..count {
        ordered.extend_from_slice(&stored[at * size..(at + 1) * size]);
        // The next index: the last dimension counts first.
        for dimension in (0..shape.len()).rev() {
            index[dimension] += 1;
            at += strides[dimension];
            if index[dimension] < shape[dimension] {
                break;
            }
            at -= strides[dimension] * shape[dimension];
            index[dimension] = 0;
        }
    }
    Ok(ordered)
}

/// Reads `count` elements of `N` bytes, a piece of the file at a time.
pub(super) fn convert<const N: usize>(
    source: &Source,
    offset: u64,
    count: usize,
    to_f32: impl Fn([u8; N]) -> f32,
) -> std::io::Result<Vec<f32>> {
    let mut floats = Vec::with_capacity(count);
    let mut piece = vec![0; PIECE.min(count * N)];
    let mut offset = offset;
    while floats.len() < count {
        let bytes = &mut piece[..PIECE.min((count - floats.len()) * N)];
        source.read_at(offset, bytes)?;
        offset += bytes.len() as u64;
        let (numbers, _) = bytes.as_chunks::<N>();
        floats.extend(numbers.iter().map(|&number| to_f32(number)));
    }
    Ok(floats)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn float_tensor(dtype: Dtype, bytes: Vec<u8>) -> (Source, Entry) {
        let count = bytes.len() / (dtype.bitsize() / 8);
        let place = Place::Bytes { file: 0, offset: 0, dtype, strides: None };
        (Source::Memory(bytes.leak()), Entry { place, shape: vec![count] })
    }

    #[test]
    fn floats_of_every_width_are_read_in_pieces() {
        // More than a piece, and not a multiple of one.
        let numbers: Vec<f32> = (0..PIECE / 2 + 7).map(|i| (i % 251) as f32 - 125.0).collect();
        let of = |dtype: Dtype| -> Vec<u8> {
            let bytes = |&x: &f32| match dtype {
                Dtype::F32 => x.to_le_bytes().to_vec(),
                Dtype::F64 => f64::from(x).to_le_bytes().to_vec(),
                Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
                _ => bf16::from_f32(x).to_le_bytes().to_vec(),
            };
            numbers.iter().flat_map(bytes).collect()
        };
        for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16] {
            let (source, entry) = float_tensor(dtype, of(dtype));
            let weights = Weights {
                files: vec![("f".to_owned(), source)],
                pickles: Vec::new(),
                tensors: HashMap::new(),
            };
            let read = weights.read("w", &entry, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(read.to_vec1::<f32>().unwrap(), numbers, "{dtype:?}");
        }
    }

    #[test]
    fn elements_are_read_into_the_order_of_their_indices() {
        let stored: Vec<u8> = (0..13).collect();
        let source = Source::Memory(stored.leak());
        // Of three dimensions, the first two swapped, and of one dimension with gaps.
        let read = |shape: &[usize], strides: &[usize]| gather(&source, 1, 1, shape, strides).unwrap();
        assert_eq!(read(&[3, 2, 2], &[2, 6, 1]), [1, 2, 7, 8, 3, 4, 9, 10, 5, 6, 11, 12]);
        assert_eq!(read(&[4], &[3]), [1, 4, 7, 10]);
        assert_eq!(read(&[2, 3], &[0, 1]), [1, 2, 3, 1, 2, 3]);
        assert!(is_contiguous(&[2, 1, 3], &[3, 7, 1]) && is_contiguous(&[], &[]));
        assert!(!is_contiguous(&[2, 3], &[1, 2]));
    }

    #[test]
    fn a_truncated_file_is_refused() {
        let tensor = safetensors::tensor::TensorView::new(Dtype::F32, vec![2], &[0; 8]).unwrap();
        let whole = safetensors::serialize([("w", tensor)], None).unwrap();
        let read = |bytes: &[u8]| header(&Source::Memory(bytes.to_vec().leak())).map(|(_, start)| start);
        assert_eq!(read(&whole), Ok(whole.len() as u64 - 8));
        assert!(read(&whole[..whole.len() - 1]).unwrap_err().contains("cut short"));
        assert!(read(&[0xff; 16]).unwrap_err().contains("header"));
        assert!(read(b"{}").is_err());
    }
}
