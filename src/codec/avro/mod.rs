//! `avro`: values in Avro's binary encoding, in Confluent's wire format or, with `input.schema`, plain.
//!
//! The JSON of a value is what one would write by hand: a union is its plain value, an enum its symbol, bytes and fixed
//! are base64, decimals exact numbers, times in the forms of RFC 3339; NaN and infinities are null. docs/formats.md has
//! the whole table.

mod decode;
mod logical;
mod plan;

use std::path::Path;

use plan::Plan;

use super::schemas::{Compile, Planned, Plans, expect_kind, of_file};
use super::write::schema::Type;
use super::{
    DecoderError, Reader, SchemaEntry, SchemaError, SchemaFileError, Selected, Stopped, Value, Waiting,
};
use crate::record::{Fault, Raw, RecordError};
use crate::registry::{Schema, SchemaKind};
use crate::settings::{self, Settings};

/// Compiles a schema to a plan for what is selected.
struct Compiler(Selected);

impl Compile for Compiler {
    type Plan = Plan;

    fn compile(&self, schema: &Schema) -> Result<Plan, SchemaError> {
        expect_kind(schema, SchemaKind::Avro)?;
        Plan::new(schema, &self.0)
    }

    fn compile_file(&self, path: &Path) -> Result<Plan, SchemaFileError> {
        Ok(self.compile(&of_file(SchemaKind::Avro, path)?)?)
    }
}

pub(super) const SCHEMA: SchemaEntry = SchemaEntry { kind: SchemaKind::Avro, types, types_of_file };

fn types(schema: &Schema, pointers: &[Vec<String>]) -> Result<Vec<Option<Type>>, SchemaError> {
    let plan = Plan::new(schema, &Selected::Whole)?;
    Ok(pointers.iter().map(|tokens| plan.type_at(plan.root, tokens)).collect())
}

fn types_of_file(
    input: &settings::Input,
    pointers: &[Vec<String>],
) -> Result<Vec<Option<Type>>, SchemaFileError> {
    Ok(types(&of_file(SchemaKind::Avro, input.schema.as_deref().unwrap_or(Path::new("")))?, pointers)?)
}

struct Avro(Plans<Compiler>);

pub(super) fn reader(settings: &Settings, selected: &Selected) -> Result<Box<dyn Reader>, DecoderError> {
    Ok(Box::new(Avro(Plans::new(settings, Compiler(selected.clone()))?)))
}

impl Reader for Avro {
    fn read<'a>(&self, value: Raw<'a>) -> Result<Value<'a>, RecordError> {
        let Planned { plan, data, .. } = self.0.of(value)?;
        let json = decode::to_json(&plan, data);
        json.map(Value::Transcoded).map_err(|error| {
            RecordError::new(Fault::Decode, format!("the value does not match its Avro schema: {error}"))
        })
    }

    fn fetch(&self, values: &mut dyn Iterator<Item = Raw<'_>>, waiting: &Waiting<'_>) -> Result<(), Stopped> {
        self.0.fetch(values, waiting)
    }
}

#[cfg(test)]
mod tests;
