//! Decodes Avro's binary encoding straight to JSON, only what the plan selects. The rest is skipped.
//!
//! A length or a count is compared with the bytes that are left before anything is made of it, so that no value can
//! ask for more memory or time than its own bytes account for.
//!
//! The encoding: <https://avro.apache.org/docs/1.12.0/specification/#binary-encoding>

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::logical;
use super::plan::{Node, NodeId, Plan};

/// Types within types that a value may have. It bounds the stack of a recursive type.
const MAX_DEPTH: u32 = 100;
/// Values without any bytes (nulls, empty records) that a value may have: its bytes do not bound their number.
const MAX_EMPTY: u32 = 1 << 16;
/// The longest JSON: a short value may stand for a long one, such as an index for a symbol.
const MAX_JSON: usize = 64 << 20;

/// Why bytes are not a value of the schema.
#[derive(Debug, PartialEq, Eq)]
pub struct DecodeError {
    /// Fields from the innermost to the outermost.
    path: Vec<Box<str>>,
    reason: String,
}

impl DecodeError {
    pub fn new(reason: impl Into<String>) -> Box<Self> {
        Box::new(Self { path: Vec::new(), reason: reason.into() })
    }
}

impl std::fmt::Display for DecodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for name in self.path.iter().rev() {
            write!(f, "/{name}")?;
        }
        if !self.path.is_empty() {
            f.write_str(": ")?;
        }
        f.write_str(&self.reason)
    }
}

type Result<T> = std::result::Result<T, Box<DecodeError>>;

/// What is selected of a value, as JSON.
///
/// # Errors
/// The bytes are not exactly one value of the plan's schema.
pub fn to_json(plan: &Plan, bytes: &[u8]) -> Result<String> {
    let mut decoder = Decoder {
        nodes: &plan.nodes,
        rest: bytes,
        empty: 0,
        depth: 0,
        out: Vec::with_capacity(bytes.len() / 2 + 32),
    };
    decoder.write(plan.root)?;
    if !decoder.rest.is_empty() {
        return Err(DecodeError::new(format!("{} bytes are left after the value", decoder.rest.len())));
    }
    String::from_utf8(decoder.out).map_err(|e| DecodeError::new(e.to_string()))
}

struct Decoder<'p, 'b> {
    nodes: &'p [Node],
    rest: &'b [u8],
    /// Values without bytes so far.
    empty: u32,
    depth: u32,
    out: Vec<u8>,
}

impl<'b> Decoder<'_, 'b> {
    /// A variable-length zigzag number.
    fn long(&mut self) -> Result<i64> {
        let mut value = 0u64;
        for (i, &byte) in self.rest.iter().enumerate().take(10) {
            // The tenth byte has one bit.
            if i == 9 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte < 0x80 {
                self.rest = &self.rest[i + 1..];
                return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        Err(if self.rest.len() < 10 {
            ends_early()
        } else {
            DecodeError::new("a number has more than 64 bits")
        })
    }

    fn int(&mut self) -> Result<i32> {
        let long = self.long()?;
        i32::try_from(long).map_err(|_| DecodeError::new("an int has more than 32 bits"))
    }

    fn take(&mut self, count: usize) -> Result<&'b [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or_else(ends_early)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or_else(ends_early)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// Bytes after their length.
    fn counted(&mut self) -> Result<&'b [u8]> {
        let length = self.long()?;
        let length = usize::try_from(length).map_err(|_| DecodeError::new("a length is negative"))?;
        self.take(length)
    }

    fn index(&mut self, count: usize) -> Result<usize> {
        let index = self.long()?;
        let found = usize::try_from(index).ok().filter(|&index| index < count);
        found.ok_or_else(|| DecodeError::new(format!("there is no alternative {index} of {count}")))
    }

    fn empty_value(&mut self) -> Result<()> {
        self.empty += 1;
        if self.empty > MAX_EMPTY {
            return Err(DecodeError::new(format!("it has more than {MAX_EMPTY} values without bytes")));
        }
        Ok(())
    }

    fn deeper(&mut self) -> Result<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(DecodeError::new(format!("it is nested deeper than {MAX_DEPTH} levels")));
        }
        Ok(())
    }

    /// Calls `each` for the items of an array or a map, with whether it is the first one. `skip`: blocks with a length in
    /// bytes are skipped at once.
    fn blocks(&mut self, skip: bool, mut each: impl FnMut(&mut Self, bool) -> Result<()>) -> Result<()> {
        let mut first = true;
        loop {
            let mut count = self.long()?;
            if count == 0 {
                return Ok(());
            }
            if count < 0 {
                let length = self.long()?;
                let length = usize::try_from(length).map_err(|_| DecodeError::new("a length is negative"))?;
                if length > self.rest.len() {
                    return Err(ends_early());
                }
                if skip {
                    self.take(length)?;
                    continue;
                }
                count = count.checked_neg().ok_or_else(|| DecodeError::new("a count is too large"))?;
            }
            for _ in 0..count {
                // Items either take bytes, or are counted by `empty_value`.
                each(self, first)?;
                first = false;
            }
        }
    }

    fn write(&mut self, id: NodeId) -> Result<()> {
        let nodes = self.nodes;
        match &nodes[id as usize] {
            Node::Null => {
                self.empty_value()?;
                self.out.extend_from_slice(b"null");
            }
            Node::Boolean => {
                let text: &[u8] = if self.boolean()? { b"true" } else { b"false" };
                self.out.extend_from_slice(text);
            }
            Node::Int => {
                let value = self.int()?;
                self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
            }
            Node::Long => {
                let value = self.long()?;
                self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
            }
            Node::Float => {
                let value = f32::from_le_bytes(self.array()?);
                self.json(&value)?;
            }
            Node::Double => {
                let value = f64::from_le_bytes(self.array()?);
                self.json(&value)?;
            }
            Node::Bytes => {
                let bytes = self.counted()?;
                self.base64(bytes);
            }
            Node::Fixed(size) => {
                if *size == 0 {
                    self.empty_value()?;
                }
                let bytes = self.take(*size)?;
                self.base64(bytes);
            }
            Node::String => {
                let bytes = self.counted()?;
                self.text(bytes)?;
            }
            Node::Enum(symbols) => {
                let index = self.index(symbols.len())?;
                self.out.extend_from_slice(symbols[index].as_bytes());
            }
            Node::Union(variants) => {
                let index = self.index(variants.len())?;
                self.write(variants[index])?;
            }
            Node::Array(items) => {
                self.deeper()?;
                self.out.push(b'[');
                self.blocks(false, |this, first| {
                    if !first {
                        this.out.push(b',');
                    }
                    this.write(*items)
                })?;
                self.out.push(b']');
                self.depth -= 1;
            }
            Node::Map(values) => {
                self.deeper()?;
                self.out.push(b'{');
                self.blocks(false, |this, first| {
                    if !first {
                        this.out.push(b',');
                    }
                    let key = this.counted()?;
                    this.text(key)?;
                    this.out.push(b':');
                    this.write(*values)
                })?;
                self.out.push(b'}');
                self.depth -= 1;
            }
            Node::Record(fields) => {
                if fields.is_empty() {
                    self.empty_value()?;
                }
                self.deeper()?;
                self.out.push(b'{');
                let mut first = true;
                for field in fields {
                    let done = match &field.member {
                        None => self.skip(field.node),
                        Some(member) => {
                            if !first {
                                self.out.push(b',');
                            }
                            first = false;
                            self.out.extend_from_slice(member.as_bytes());
                            self.write(field.node)
                        }
                    };
                    done.map_err(|e| within(e, &field.name))?;
                }
                self.out.push(b'}');
                self.depth -= 1;
            }
            Node::Decimal { size, scale } => {
                let unscaled = match size {
                    Some(size) => self.take(*size)?,
                    None => self.counted()?,
                };
                logical::decimal(unscaled, *scale as i64, &mut self.out)?;
            }
            Node::BigDecimal => {
                let mut inner = Decoder { rest: self.counted()?, out: Vec::new(), ..*self };
                let (unscaled, scale) = (inner.counted()?, inner.long()?);
                logical::decimal(unscaled, scale, &mut self.out)?;
            }
            Node::Uuid { counted } => {
                let bytes = if *counted { self.counted()? } else { self.take(16)? };
                logical::uuid(bytes, &mut self.out)?;
            }
            Node::Date => {
                let days = self.int()?;
                logical::date(days, &mut self.out)?;
            }
            Node::Time(unit) => {
                let count = self.long()?;
                logical::time(count, *unit, &mut self.out)?;
            }
            Node::Timestamp { unit, local } => {
                let count = self.long()?;
                logical::timestamp(count, *unit, *local, &mut self.out)?;
            }
            Node::Duration => {
                let parts = self.array::<12>()?;
                logical::duration(&parts, &mut self.out);
            }
        }
        if self.out.len() > MAX_JSON {
            return Err(DecodeError::new(format!("it has more than {} MiB as JSON", MAX_JSON >> 20)));
        }
        Ok(())
    }

    fn boolean(&mut self) -> Result<bool> {
        let [byte] = self.array::<1>()?;
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::new(format!("a boolean is {byte}, not 0 or 1"))),
        }
    }

    /// Writes a number. JSON has no NaN and no infinity: they become null.
    fn json(&mut self, value: &impl serde::Serialize) -> Result<()> {
        serde_json::to_writer(&mut self.out, value).map_err(|e| DecodeError::new(e.to_string()))
    }

    fn text(&mut self, bytes: &[u8]) -> Result<()> {
        let text = std::str::from_utf8(bytes)
            .map_err(|e| DecodeError::new(format!("a string is not UTF-8: {e}")))?;
        self.json(&text)
    }

    fn base64(&mut self, bytes: &[u8]) {
        let start = self.out.len() + 1;
        let length = bytes.len().div_ceil(3) * 4;
        self.out.push(b'"');
        self.out.resize(start + length, 0);
        // The slice has the length of the encoding.
        let written = STANDARD.encode_slice(bytes, &mut self.out[start..]).unwrap_or_default();
        self.out.truncate(start + written);
        self.out.push(b'"');
    }

    fn skip(&mut self, id: NodeId) -> Result<()> {
        let nodes = self.nodes;
        match &nodes[id as usize] {
            Node::Null => self.empty_value()?,
            Node::Boolean => {
                self.boolean()?;
            }
            Node::Int | Node::Date => {
                self.int()?;
            }
            Node::Long | Node::Time(_) | Node::Timestamp { .. } => {
                self.long()?;
            }
            Node::Float => {
                self.take(4)?;
            }
            Node::Double => {
                self.take(8)?;
            }
            Node::Bytes
            | Node::String
            | Node::BigDecimal
            | Node::Uuid { counted: true }
            | Node::Decimal { size: None, .. } => {
                self.counted()?;
            }
            Node::Fixed(size) | Node::Decimal { size: Some(size), .. } => {
                if *size == 0 {
                    self.empty_value()?;
                }
                self.take(*size)?;
            }
            Node::Uuid { counted: false } => {
                self.take(16)?;
            }
            Node::Duration => {
                self.take(12)?;
            }
            Node::Enum(symbols) => {
                self.index(symbols.len())?;
            }
            Node::Union(variants) => {
                let index = self.index(variants.len())?;
                self.skip(variants[index])?;
            }
            Node::Array(items) => {
                self.deeper()?;
                self.blocks(true, |this, _| this.skip(*items))?;
                self.depth -= 1;
            }
            Node::Map(values) => {
                self.deeper()?;
                self.blocks(true, |this, _| {
                    this.counted()?;
                    this.skip(*values)
                })?;
                self.depth -= 1;
            }
            Node::Record(fields) => {
                if fields.is_empty() {
                    self.empty_value()?;
                }
                self.deeper()?;
                for field in fields {
                    self.skip(field.node).map_err(|e| within(e, &field.name))?;
                }
                self.depth -= 1;
            }
        }
        Ok(())
    }
}

fn ends_early() -> Box<DecodeError> {
    DecodeError::new("the value ends early")
}

/// Adds the field in which an error was found.
fn within(mut error: Box<DecodeError>, field: &str) -> Box<DecodeError> {
    error.path.push(field.into());
    error
}
