//! PyTorch's format before zip files (`torch.save` until PyTorch 1.6): pickles, and after them the bytes of each
//! storage.
//!
//! ```text
//! pickle   a magic number
//! pickle   the version, 1001
//! pickle   the byte order and sizes of the machine
//! pickle   the tensors by name; each names its storage by a key
//! pickle   the keys, in the order of the storages
//! for each key: the number of elements in 8 bytes, then the elements
//! ```
//!
//! Candle's reader turns pickles into plain values: it runs no code. Of the functions that pickles name, only those
//! that rebuild tensors from these values have an effect here; a value that any other function would make is no tensor.

use std::collections::HashMap;
use std::io::{BufReader, Read};

use candle_core::pickle::{Object, Stack};
use safetensors::Dtype;

use crate::model::store::Source;

/// The first pickle without its protocol's number: the magic number `0x1950a86a20f9469cfc6c`, and its end.
const MAGIC: [u8; 13] = [0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];
/// Bytes of the first pickle.
const START: u64 = 2 + MAGIC.len() as u64;
const VERSION: i64 = 1001;

/// Where a tensor's elements are.
#[derive(Debug, PartialEq)]
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Of the first element, in bytes from the start of the file.
    pub offset: u64,
    /// How many elements each dimension's next index is apart.
    pub strides: Vec<usize>,
}

/// A tensor as its pickle describes it.
struct Tensor<'a> {
    key: &'a str,
    dtype: Dtype,
    /// Elements of its storage.
    count: u64,
    /// Of its first element, in elements.
    first: u64,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// Whether a file has this format.
///
/// # Errors
/// The file cannot be read.
pub fn is_legacy(source: &Source) -> std::io::Result<bool> {
    let mut start = [0; START as usize];
    if source.len()? < START {
        return Ok(false);
    }
    source.read_at(0, &mut start)?;
    Ok(start[0] == 0x80 && start[2..] == MAGIC)
}

/// Reads where all tensors are, without reading them.
///
/// # Errors
/// The file is malformed, cut short, or of another machine's byte order.
///
/// # Panics
/// Candle's reader panics on some malformed pickles.
pub fn read(source: &Source) -> Result<Vec<Stored>, String> {
    let length = source.len().map_err(|e| e.to_string())?;
    let mut reader = BufReader::new(At { source, position: START, length });
    if int(&load(&mut reader)?) != Some(VERSION) {
        return Err(format!("its version is not {VERSION}"));
    }
    if member(&load(&mut reader)?, "little_endian") != Some(&Object::Bool(true)) {
        return Err("its byte order is not little-endian".to_owned());
    }
    let state = load(&mut reader)?;
    let Object::List(keys) = load(&mut reader)? else { return Err("it has no list of storages".to_owned()) };
    let mut position = reader.get_ref().position - reader.buffer().len() as u64;
    let mut storages = HashMap::new();
    collect(&state, &mut storages)?;
    let mut places = HashMap::new();
    for key in keys {
        let Object::Unicode(key) = key else { return Err("the key of a storage is not a text".to_owned()) };
        let known = storages.get(key.as_str());
        let (dtype, count) = *known.ok_or_else(|| format!("no tensor says what the storage {key} has"))?;
        let mut stated = [0; 8];
        source.read_at(position, &mut stated).map_err(|_| cut_short(length))?;
        if u64::from_le_bytes(stated) != count {
            return Err(format!(
                "the storage {key} has {} elements, not {count}",
                u64::from_le_bytes(stated)
            ));
        }
        let start = position + 8;
        let end = count.checked_mul(size(dtype)).and_then(|bytes| start.checked_add(bytes));
        position = end.filter(|end| *end <= length).ok_or_else(|| cut_short(length))?;
        places.insert(key, start);
    }
    let mut stored = Vec::new();
    for (name, tensor) in named(&state)? {
        let place = places.get(tensor.key);
        let start = place.ok_or_else(|| format!("{name}: the file has no storage {}", tensor.key))?;
        if !tensor.is_within() {
            return Err(format!("{name} reaches beyond its storage"));
        }
        stored.push(Stored {
            name: name.to_owned(),
            dtype: tensor.dtype,
            offset: start + tensor.first * size(tensor.dtype),
            shape: tensor.shape,
            strides: tensor.strides,
        });
    }
    Ok(stored)
}

fn cut_short(length: u64) -> String {
    format!("it has {length} bytes, and its storages need more: was its download cut short?")
}

fn size(dtype: Dtype) -> u64 {
    dtype.bitsize() as u64 / 8
}

fn load(reader: &mut impl std::io::BufRead) -> Result<Object, String> {
    let mut stack = Stack::empty();
    stack.read_loop(reader).and_then(|()| stack.finalize()).map_err(|e| crate::model::message(&e))
}

/// The bytes of a file from a position on.
struct At<'s> {
    source: &'s Source,
    position: u64,
    length: u64,
}

impl Read for At<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = out.len().min(self.length.saturating_sub(self.position) as usize);
        self.source.read_at(self.position, &mut out[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Tensor<'_> {
    /// Whether all elements are in its storage, and no more than that has.
    fn is_within(&self) -> bool {
        let count = self.shape.iter().try_fold(1, |product: u64, &n| product.checked_mul(n as u64));
        if self.shape.len() != self.strides.len() || count.is_none_or(|count| count > self.count) {
            return false;
        }
        if self.shape.contains(&0) {
            return true;
        }
        let mut steps = self.shape.iter().zip(&self.strides);
        let last = steps.try_fold(self.first, |sum, (&n, &stride)| {
            sum.checked_add((n as u64 - 1).checked_mul(stride as u64)?)
        });
        last.is_some_and(|last| last < self.count)
    }
}

/// The tensors of a state dict, by name.
fn named(state: &Object) -> Result<Vec<(&str, Tensor<'_>)>, String> {
    let Object::Dict(members) = dict(state) else { return Err("it holds no tensors by name".to_owned()) };
    let mut tensors = Vec::new();
    for (name, value) in members {
        if let (Object::Unicode(name), Some((function, args))) = (name, call(value))
            && let Some(tensor) = tensor(function, args).map_err(|e| format!("{name}: {e}"))?
        {
            tensors.push((name.as_str(), tensor));
        }
    }
    Ok(tensors)
}

/// Of an object with attributes, what has them.
fn dict(state: &Object) -> &Object {
    match state {
        Object::Build { callable, .. } => callable,
        other => other,
    }
}

/// Module and name of a function, and its arguments.
fn call(value: &Object) -> Option<((&str, &str), &[Object])> {
    let Object::Reduce { callable, args } = value else { return None };
    match (&**callable, &**args) {
        (Object::Class { module_name, class_name }, Object::Tuple(args)) => {
            Some(((module_name, class_name), args))
        }
        _ => None,
    }
}

/// The tensor that a function rebuilds; `None` for a function that rebuilds none.
///
/// # Errors
/// The arguments are not those of the function.
fn tensor<'a>((module, name): (&str, &str), args: &'a [Object]) -> Result<Option<Tensor<'a>>, String> {
    let inner = |value: &'a Object| match call(value) {
        Some((function, args)) => tensor(function, args),
        None => Ok(None),
    };
    match (module, name, args) {
        ("torch._utils", "_rebuild_parameter", [data, ..]) => inner(data),
        (
            "torch._tensor",
            "_rebuild_from_type_v2",
            [Object::Class { module_name, class_name }, _, Object::Tuple(args), ..],
        ) => tensor((module_name, class_name), args),
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2", [storage, first, shape, strides, ..]) => {
            let (key, dtype, count, start) = storage_of(storage)?;
            let place = |value: &Object| int(value).and_then(|value| u64::try_from(value).ok());
            let sizes = |value: &Object| match value {
                Object::Tuple(sizes) => sizes.iter().map(|n| usize::try_from(int(n)?).ok()).collect(),
                _ => None,
            };
            match (place(first), sizes(shape), sizes(strides)) {
                (Some(first), Some(shape), Some(strides)) => {
                    Ok(Some(Tensor { key, dtype, count, first: start.saturating_add(first), shape, strides }))
                }
                _ => Err("its shape is not valid".to_owned()),
            }
        }
        _ => Ok(None),
    }
}

/// Key, type and number of elements of a storage, and the first element of a part of it.
fn storage_of(value: &Object) -> Result<(&str, Dtype, u64, u64), String> {
    let unknown = || "its storage is not described as PyTorch does".to_owned();
    let Object::PersistentLoad(id) = value else { return Err(unknown()) };
    let Object::Tuple(id) = &**id else { return Err(unknown()) };
    let [Object::Unicode(kind), Object::Class { class_name, .. }, Object::Unicode(key), _, count, rest @ ..] =
        id.as_slice()
    else {
        return Err(unknown());
    };
    let count = int(count).and_then(|count| u64::try_from(count).ok());
    let (Some(count), "storage") = (count, kind.as_str()) else { return Err(unknown()) };
    let start = match rest {
        // A part of a storage: its key, first element and number of elements.
        [Object::Tuple(part), ..] => part.get(1).and_then(int).and_then(|start| u64::try_from(start).ok()),
        _ => Some(0),
    };
    let dtype = match class_name.as_str() {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::BOOL,
        other => return Err(format!("{other} is not supported")),
    };
    Ok((key, dtype, count, start.ok_or_else(unknown)?))
}

/// Type and number of elements of all storages in a value, by key.
fn collect<'a>(value: &'a Object, storages: &mut HashMap<&'a str, (Dtype, u64)>) -> Result<(), String> {
    let mut left = vec![value];
    while let Some(value) = left.pop() {
        match value {
            Object::PersistentLoad(_) => {
                let (key, dtype, count, _) = storage_of(value)?;
                storages.insert(key, (dtype, count));
            }
            Object::Tuple(values) | Object::List(values) => left.extend(values),
            Object::Dict(members) => left.extend(members.iter().flat_map(|(key, value)| [key, value])),
            Object::Reduce { callable, args } | Object::Build { callable, args } => {
                left.extend([&**callable, &**args]);
            }
            _ => {}
        }
    }
    Ok(())
}

fn int(value: &Object) -> Option<i64> {
    match value {
        Object::Int(value) => Some(i64::from(*value)),
        Object::Long(value) => Some(*value),
        _ => None,
    }
}

fn member<'a>(value: &'a Object, name: &str) -> Option<&'a Object> {
    let Object::Dict(members) = value else { return None };
    members.iter().find(|(key, _)| matches!(key, Object::Unicode(key) if key == name)).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of tests/fixtures/pickles.
    fn source(name: &str) -> Vec<u8> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pickles");
        std::fs::read(folder.join(name)).unwrap()
    }

    fn read_bytes(bytes: Vec<u8>) -> Result<Vec<Stored>, String> {
        let source = Source::Memory(bytes.leak());
        assert!(is_legacy(&source).unwrap());
        read(&source)
    }

    #[test]
    fn strides_and_parts_of_storages_are_read() {
        let stored = read_bytes(source("legacy.bin")).unwrap();
        let of = |end: &str| stored.iter().find(|tensor| tensor.name.ends_with(end)).unwrap();
        let transposed = of("pooler.dense.weight");
        assert_eq!(
            (transposed.shape.as_slice(), transposed.strides.as_slice()),
            (&[32, 32][..], &[1, 32][..])
        );
        // The classifier's weight and bias are parts of one storage.
        let (weight, bias) = (of("classifier.weight"), of("classifier.bias"));
        assert_eq!(bias.offset - weight.offset, 3 * 32 * 4);
    }

    #[test]
    fn a_file_that_is_cut_short_is_refused() {
        let whole = source("legacy.bin");
        let message = read_bytes(whole[..whole.len() - 1].to_vec()).unwrap_err();
        assert!(message.contains("cut short"), "{message}");
        assert!(!is_legacy(&Source::Memory(b"PK\x03\x04 is the start of a zip file")).unwrap());
        assert!(!is_legacy(&Source::Memory(b"")).unwrap());
    }

    #[test]
    fn a_tensor_beyond_its_storage_is_refused() {
        let tensor = |first: u64, shape: &[usize], strides: &[usize]| Tensor {
            key: "",
            dtype: Dtype::F32,
            count: 6,
            first,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        assert!(tensor(0, &[2, 3], &[3, 1]).is_within());
        assert!(tensor(0, &[3, 2], &[1, 3]).is_within());
        assert!(tensor(9, &[0], &[1]).is_within());
        assert!(!tensor(1, &[2, 3], &[3, 1]).is_within());
        assert!(!tensor(0, &[2, 3], &[3]).is_within());
        assert!(!tensor(0, &[1 << 40, 1 << 40], &[0, 0]).is_within());
        assert!(!tensor(0, &[2, 3], &[usize::MAX, 1]).is_within());
    }
}
