//! Operators on categories: OneHotEncoder, LabelEncoder, CategoryMapper.

use std::collections::HashMap;
use std::hash::Hash;

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::{NodeProto, TensorProto};
use tract_onnx::tract_hir::internal::*;

use super::{Built, LENIENT, Operator, Shape, built, elements, tensor};

/// Where each category is in a list; of equal ones the first.
fn places<K: Eq + Hash>(categories: impl IntoIterator<Item = K>) -> HashMap<K, usize> {
    let mut places = HashMap::new();
    for (place, category) in categories.into_iter().enumerate() {
        places.entry(category).or_insert(place);
    }
    places
}

#[derive(Debug)]
enum Categories {
    Texts(HashMap<String, usize>),
    Integers(HashMap<i64, usize>),
}

#[derive(Debug)]
struct OneHot {
    categories: Categories,
    count: usize,
    /// Whether an unknown category is all zeros; otherwise it is an error.
    zeros: bool,
}

pub fn one_hot(node: &NodeProto) -> Built {
    let texts = node.get_attr_opt_vec::<String>("cats_strings")?.unwrap_or_default();
    let integers = node.get_attr_opt_vec::<i64>("cats_int64s")?.unwrap_or_default();
    let count = texts.len().max(integers.len());
    let categories = match (texts.is_empty(), integers.is_empty()) {
        (false, true) => Categories::Texts(places(texts)),
        (true, false) => Categories::Integers(places(integers)),
        _ => bail!("OneHotEncoder needs either cats_strings or cats_int64s"),
    };
    built(OneHot { categories, count, zeros: node.get_attr_opt::<i64>("zeros")?.unwrap_or(1) != 0 })
}

impl Operator for OneHot {
    fn name(&self) -> &'static str {
        "OneHotEncoder"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        let (of, mut shape) = inputs[0].clone();
        if (of == DatumType::String) != matches!(self.categories, Categories::Texts(_)) {
            bail!("the categories of OneHotEncoder do not fit its input of {of:?}");
        }
        shape.push(self.count.to_dim());
        Ok(tvec!((DatumType::F32, shape)))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let mut ones = vec![0.0f32; inputs[0].len() * self.count];
        let mut set = |i: usize, place: Option<&usize>, what: &dyn std::fmt::Display| match place {
            Some(place) => {
                ones[i * self.count + place] = 1.0;
                Ok(())
            }
            None if self.zeros || LENIENT.get() => Ok(()),
            None => Err(format_err!("the category {what} is unknown to OneHotEncoder")),
        };
        match &self.categories {
            Categories::Texts(places) => {
                for (i, text) in elements::<String>(&inputs[0])?.iter().enumerate() {
                    set(i, places.get(text), text)?;
                }
            }
            Categories::Integers(places) => {
                for (i, n) in elements::<i64>(&*inputs[0].cast_to::<i64>()?)?.iter().enumerate() {
                    set(i, places.get(n), n)?;
                }
            }
        }
        let mut shape = inputs[0].shape().to_vec();
        shape.push(self.count);
        Ok(tvec!(tensor(&shape, ones)?))
    }
}

/// Values that a category is mapped to, with the one for unknown categories at the end.
#[derive(Debug)]
enum Values {
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Doubles(Vec<f64>),
}

#[derive(Debug)]
enum Keys {
    Texts(HashMap<String, usize>),
    Integers(HashMap<i64, usize>),
    /// By their bits: all NaN are one key, and so are both zeros.
    Floats(HashMap<u64, usize>),
}

fn bits(x: f64) -> u64 {
    match x {
        x if x.is_nan() => f64::NAN.to_bits(),
        0.0 => 0,
        x => x.to_bits(),
    }
}

#[derive(Debug)]
struct Encoder {
    name: &'static str,
    keys: Keys,
    values: Values,
}

pub fn mapper(node: &NodeProto) -> Built {
    let texts: Vec<String> = node.get_attr_vec("cats_strings")?;
    let integers: Vec<i64> = node.get_attr_vec("cats_int64s")?;
    let text = node.get_attr_opt::<String>("default_string")?;
    let integer = node.get_attr_opt::<i64>("default_int64")?;
    // Which way it maps depends on the input's type, so both ways are prepared.
    built(Mapper {
        to_integers: Encoder {
            name: "CategoryMapper",
            keys: Keys::Texts(places(texts.iter().cloned())),
            values: Values::Integers(with_last(integers.clone(), integer.unwrap_or(-1))),
        },
        to_texts: Encoder {
            name: "CategoryMapper",
            keys: Keys::Integers(places(integers)),
            values: Values::Texts(with_last(texts, text.unwrap_or_else(|| "_Unused".to_owned()))),
        },
    })
}

#[derive(Debug)]
struct Mapper {
    to_integers: Encoder,
    to_texts: Encoder,
}

impl Mapper {
    fn of(&self, input: DatumType) -> &Encoder {
        if input == DatumType::String { &self.to_integers } else { &self.to_texts }
    }
}

impl Operator for Mapper {
    fn name(&self) -> &'static str {
        "CategoryMapper"
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        self.of(inputs[0].0).outputs(inputs)
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        self.of(inputs[0].datum_type()).run(inputs)
    }
}

fn with_last<T>(mut values: Vec<T>, last: T) -> Vec<T> {
    values.push(last);
    values
}

pub fn label_encoder(context: &ParsingContext, node: &NodeProto) -> Built {
    let name = "LabelEncoder";
    // Version 1 maps texts to their places and places to texts.
    if let Some(texts) = node.get_attr_opt_vec::<String>("classes_strings")? {
        let text = node.get_attr_opt("default_string")?.unwrap_or_else(|| "_Unused".to_owned());
        let integer = node.get_attr_opt("default_int64")?.unwrap_or(-1);
        let count = texts.len() as i64;
        return built(Mapper {
            to_integers: Encoder {
                name,
                keys: Keys::Texts(places(texts.iter().cloned())),
                values: Values::Integers(with_last((0..count).collect(), integer)),
            },
            to_texts: Encoder {
                name,
                keys: Keys::Integers(places(0..count)),
                values: Values::Texts(with_last(texts, text)),
            },
        });
    }
    let of_tensor = |name: &str| -> TractResult<Option<Tensor>> {
        node.get_attr_opt::<&TensorProto>(name)?.map(|proto| context.load_tensor(proto)).transpose()
    };
    let keys = if let Some(texts) = node.get_attr_opt_vec::<String>("keys_strings")? {
        Keys::Texts(places(texts))
    } else if let Some(integers) = node.get_attr_opt_vec::<i64>("keys_int64s")? {
        Keys::Integers(places(integers))
    } else if let Some(floats) = node.get_attr_opt_vec::<f32>("keys_floats")? {
        Keys::Floats(places(floats.into_iter().map(|x| bits(f64::from(x)))))
    } else if let Some(keys) = of_tensor("keys_tensor")? {
        match keys.datum_type() {
            DatumType::String => Keys::Texts(places(elements::<String>(&keys)?.iter().cloned())),
            DatumType::F32 | DatumType::F64 => {
                let keys = keys.cast_to::<f64>()?;
                Keys::Floats(places(elements::<f64>(&keys)?.iter().map(|x| bits(*x))))
            }
            _ => Keys::Integers(places(elements::<i64>(&*keys.cast_to::<i64>()?)?.iter().copied())),
        }
    } else {
        bail!("{name} has no keys");
    };
    let unknown = of_tensor("default_tensor")?;
    let values = if let Some(texts) = node.get_attr_opt_vec::<String>("values_strings")? {
        let last = node.get_attr_opt("default_string")?.unwrap_or_else(|| "_Unused".to_owned());
        Values::Texts(with_last(texts, last))
    } else if let Some(integers) = node.get_attr_opt_vec::<i64>("values_int64s")? {
        Values::Integers(with_last(integers, node.get_attr_opt("default_int64")?.unwrap_or(-1)))
    } else if let Some(floats) = node.get_attr_opt_vec::<f32>("values_floats")? {
        Values::Floats(with_last(floats, node.get_attr_opt("default_float")?.unwrap_or(-0.0)))
    } else if let Some(values) = of_tensor("values_tensor")? {
        match values.datum_type() {
            DatumType::String => {
                let last = match &unknown {
                    Some(of) => elements::<String>(of)?.first().cloned(),
                    None => None,
                };
                Values::Texts(with_last(
                    elements::<String>(&values)?.to_vec(),
                    last.unwrap_or_else(|| "_Unused".to_owned()),
                ))
            }
            DatumType::F32 => {
                let last = unknown.map_or(Ok(-0.0), |of| of.cast_to_scalar::<f32>())?;
                Values::Floats(with_last(elements::<f32>(&values)?.to_vec(), last))
            }
            DatumType::F64 => {
                let last = unknown.map_or(Ok(-0.0), |of| of.cast_to_scalar::<f64>())?;
                Values::Doubles(with_last(elements::<f64>(&values)?.to_vec(), last))
            }
            _ => {
                let last = unknown.map_or(Ok(-1), |of| of.cast_to_scalar::<i64>())?;
                Values::Integers(with_last(elements::<i64>(&*values.cast_to::<i64>()?)?.to_vec(), last))
            }
        }
    } else {
        bail!("{name} has no values");
    };
    let encoder = Encoder { name, keys, values };
    if encoder.count(Some(&encoder.keys)) + 1 > encoder.count(None) {
        bail!("{name} has fewer values than keys");
    }
    built(encoder)
}

impl Encoder {
    fn datum_type(&self) -> DatumType {
        match self.values {
            Values::Texts(_) => DatumType::String,
            Values::Integers(_) => DatumType::I64,
            Values::Floats(_) => DatumType::F32,
            Values::Doubles(_) => DatumType::F64,
        }
    }

    /// One more than the highest place of the keys, or the number of values.
    fn count(&self, keys: Option<&Keys>) -> usize {
        let highest = |places: &mut dyn Iterator<Item = &usize>| places.max().map_or(0, |place| place + 1);
        match (keys, &self.values) {
            (Some(Keys::Texts(all)), _) => highest(&mut all.values()),
            (Some(Keys::Integers(all)), _) => highest(&mut all.values()),
            (Some(Keys::Floats(all)), _) => highest(&mut all.values()),
            (None, Values::Texts(all)) => all.len(),
            (None, Values::Integers(all)) => all.len(),
            (None, Values::Floats(all)) => all.len(),
            (None, Values::Doubles(all)) => all.len(),
        }
    }
}

impl Operator for Encoder {
    fn name(&self) -> &'static str {
        self.name
    }

    fn outputs(&self, inputs: &[(DatumType, Shape)]) -> TractResult<TVec<(DatumType, Shape)>> {
        let (of, shape) = inputs[0].clone();
        if (of == DatumType::String) != matches!(self.keys, Keys::Texts(_)) {
            bail!("the keys of {} do not fit its input of {of:?}", self.name);
        }
        Ok(tvec!((self.datum_type(), shape)))
    }

    fn run(&self, inputs: &[TValue]) -> TractResult<TVec<Tensor>> {
        let input = &inputs[0];
        let last = self.count(None) - 1;
        let found: Vec<usize> = match &self.keys {
            Keys::Texts(places) => {
                elements::<String>(input)?.iter().map(|key| *places.get(key).unwrap_or(&last)).collect()
            }
            Keys::Integers(places) => elements::<i64>(&*input.cast_to::<i64>()?)?
                .iter()
                .map(|key| *places.get(key).unwrap_or(&last))
                .collect(),
            Keys::Floats(places) => elements::<f64>(&*input.cast_to::<f64>()?)?
                .iter()
                .map(|key| *places.get(&bits(*key)).unwrap_or(&last))
                .collect(),
        };
        let shape = input.shape();
        Ok(tvec!(match &self.values {
            Values::Texts(all) => tensor(shape, found.iter().map(|&i| all[i].clone()).collect())?,
            Values::Integers(all) => tensor(shape, found.iter().map(|&i| all[i]).collect())?,
            Values::Floats(all) => tensor(shape, found.iter().map(|&i| all[i]).collect())?,
            Values::Doubles(all) => tensor(shape, found.iter().map(|&i| all[i]).collect())?,
        }))
    }
}
