//! A writer's schema, compiled once: a node per type, with what is selected marked, so that decoding needs no schema.

use std::collections::HashMap;

use apache_avro::schema::{FixedSchema, InnerDecimalSchema, Name, RecordSchema, UuidSchema};

use crate::codec::SchemaError;
use crate::codec::selected::Selected;
use crate::codec::write::schema::Type;
use crate::registry;

/// Index of a node in [`Plan::nodes`].
pub type NodeId = u32;

#[derive(Debug)]
pub struct Plan {
    pub nodes: Vec<Node>,
    pub root: NodeId,
}

/// How a type is decoded, and what its JSON is.
#[derive(Debug)]
pub enum Node {
    Null,
    Boolean,
    Int,
    Long,
    Float,
    Double,
    /// Base64.
    Bytes,
    String,
    /// Base64; the number of bytes.
    Fixed(usize),
    /// The symbols, as JSON strings.
    Enum(Vec<Box<str>>),
    Array(NodeId),
    Map(NodeId),
    Union(Vec<NodeId>),
    Record(Vec<Field>),
    /// A number. `size`: the bytes of a fixed; `None` for bytes.
    Decimal {
        size: Option<usize>,
        scale: usize,
    },
    /// A number: bytes that hold the unscaled bytes and their scale.
    BigDecimal,
    /// 16 bytes, of a fixed or (with `counted`) of bytes.
    Uuid {
        counted: bool,
    },
    Date,
    Time(Unit),
    Timestamp {
        unit: Unit,
        local: bool,
    },
    Duration,
}

#[derive(Debug)]
pub struct Field {
    pub name: Box<str>,
    /// The member's name as JSON, with its colon, if the field is selected.
    pub member: Option<Box<str>>,
    pub node: NodeId,
}

/// What a time is counted in.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    Millis,
    Micros,
    Nanos,
}

impl Plan {
    /// # Errors
    /// The schema is not valid.
    pub fn new(schema: &registry::Schema, selected: &Selected) -> Result<Self, SchemaError> {
        let references: Vec<&str> =
            schema.all_references().iter().map(|(_, schema)| schema.text.as_str()).collect();
        let invalid = |e: apache_avro::Error| SchemaError(e.to_string());
        let (root, others) = if references.is_empty() {
            (apache_avro::Schema::parse_str(&schema.text).map_err(invalid)?, Vec::new())
        } else {
            apache_avro::Schema::parse_str_with_list(&schema.text, references).map_err(invalid)?
        };
        let mut compiler =
            Compiler { names: HashMap::new(), nodes: Vec::new(), whole: HashMap::new(), depth: 0 };
        others.iter().chain([&root]).for_each(|schema| compiler.name(schema));
        let root = compiler.node(&root, Some(selected))?;
        Ok(Self { nodes: compiler.nodes, root })
    }

    /// The type that a prediction has for the member at a pointer, of a value of a node's type; `None` if there can be no
    /// such member.
    pub fn type_at(&self, node: NodeId, tokens: &[String]) -> Option<Type> {
        let [first, rest @ ..] = tokens else { return Some(self.type_of(node)) };
        match &self.nodes[node as usize] {
            Node::Record(fields) => {
                fields.iter().find(|field| *field.name == **first).and_then(|f| self.type_at(f.node, rest))
            }
            Node::Union(variants) => {
                Type::common(variants.iter().filter_map(|&variant| self.type_at(variant, tokens)))
            }
            Node::Array(items) if first.parse::<usize>().is_ok() => self.type_at(*items, rest),
            Node::Map(values) => self.type_at(*values, rest),
            Node::Duration
                if rest.is_empty() && ["months", "days", "milliseconds"].contains(&first.as_str()) =>
            {
                Some(Type::Long { quoted: false })
            }
            _ => None,
        }
    }

    /// Of numbers the widest one, so that a promotion in the input's schema (int to long, float to double) changes nothing.
    fn type_of(&self, node: NodeId) -> Type {
        // Null is no value of a list or map in a prediction.
        let of_values = |of: fn(Type) -> Type, values: NodeId| match &self.nodes[values as usize] {
            Node::Union(_) => Type::Json,
            _ => Type::of_scalars(of, self.type_of(values)),
        };
        match &self.nodes[node as usize] {
            Node::Boolean => Type::Boolean,
            Node::Int | Node::Long => Type::Long { quoted: false },
            Node::Float | Node::Double => Type::Double { quoted: false },
            Node::Bytes
            | Node::String
            | Node::Fixed(_)
            | Node::Enum(_)
            | Node::Uuid { .. }
            | Node::Date
            | Node::Time(_)
            | Node::Timestamp { .. } => Type::Text,
            Node::Array(items) => of_values(Type::list, *items),
            Node::Map(values) => of_values(Type::map, *values),
            Node::Union(variants) => {
                let some = variants.iter().filter(|&&id| !matches!(self.nodes[id as usize], Node::Null));
                Type::common(some.map(|&variant| self.type_of(variant))).unwrap_or(Type::Json)
            }
            // A record may have more members in the next version of its schema.
            Node::Null | Node::Record(_) | Node::Decimal { .. } | Node::BigDecimal | Node::Duration => {
                Type::Json
            }
        }
    }
}

struct Compiler<'a> {
    /// The definitions of all named types.
    names: HashMap<&'a Name, &'a apache_avro::Schema>,
    nodes: Vec<Node>,
    /// Nodes of records that are selected as a whole, or skipped: only those can be recursive.
    whole: HashMap<(&'a Name, bool), NodeId>,
    depth: usize,
}

/// Types within types that a schema may have. It bounds the stack.
const MAX_DEPTH: usize = 200;

impl<'a> Compiler<'a> {
    /// Adds the named types of a schema.
    fn name(&mut self, schema: &'a apache_avro::Schema) {
        use apache_avro::Schema as S;
        let mut add = |name: &'a Name| {
            self.names.insert(name, schema);
        };
        match schema {
            S::Enum(of) => add(&of.name),
            S::Fixed(of) | S::Duration(of) | S::Uuid(UuidSchema::Fixed(of)) => add(&of.name),
            S::Decimal(of) => {
                if let InnerDecimalSchema::Fixed(fixed) = &of.inner {
                    add(&fixed.name);
                }
            }
            S::Record(of) => {
                add(&of.name);
                of.fields.iter().for_each(|field| self.name(&field.schema));
            }
            S::Array(of) => self.name(&of.items),
            S::Map(of) => self.name(&of.types),
            S::Union(of) => of.variants().iter().for_each(|variant| self.name(variant)),
            _ => {}
        }
    }

    fn push(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        (self.nodes.len() - 1) as NodeId
    }

    /// Compiles a type. `selected`: `None` if it is only skipped.
    fn node(
        &mut self,
        schema: &'a apache_avro::Schema,
        selected: Option<&Selected>,
    ) -> Result<NodeId, SchemaError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(SchemaError(format!("its types are nested deeper than {MAX_DEPTH} levels")));
        }
        let node = self.node_below(schema, selected);
        self.depth -= 1;
        node
    }

    fn node_below(
        &mut self,
        schema: &'a apache_avro::Schema,
        selected: Option<&Selected>,
    ) -> Result<NodeId, SchemaError> {
        use apache_avro::Schema as S;
        // An index of an array or a key of a map selects the whole: the pointer is followed in the JSON.
        let inside = selected.map(|_| &Selected::Whole);
        let node = match schema {
            S::Null => Node::Null,
            S::Boolean => Node::Boolean,
            S::Int => Node::Int,
            S::Long => Node::Long,
            S::Float => Node::Float,
            S::Double => Node::Double,
            S::Bytes => Node::Bytes,
            S::String | S::Uuid(UuidSchema::String) => Node::String,
            S::Array(of) => Node::Array(self.node(&of.items, inside)?),
            S::Map(of) => Node::Map(self.node(&of.types, inside)?),
            S::Union(of) => {
                let variants: Result<_, _> =
                    of.variants().iter().map(|variant| self.node(variant, selected)).collect();
                Node::Union(variants?)
            }
            S::Record(of) => return self.record(of, selected),
            S::Enum(of) => {
                let symbol = |symbol: &String| serde_json::Value::from(symbol.as_str()).to_string().into();
                Node::Enum(of.symbols.iter().map(symbol).collect())
            }
            S::Fixed(of) => Node::Fixed(of.size),
            S::Decimal(of) => {
                let size = match &of.inner {
                    InnerDecimalSchema::Bytes => None,
                    InnerDecimalSchema::Fixed(fixed) => Some(fixed.size),
                };
                Node::Decimal { size, scale: of.scale }
            }
            S::BigDecimal => Node::BigDecimal,
            S::Uuid(UuidSchema::Bytes) => Node::Uuid { counted: true },
            S::Uuid(UuidSchema::Fixed(FixedSchema { .. })) => Node::Uuid { counted: false },
            S::Date => Node::Date,
            S::TimeMillis => Node::Time(Unit::Millis),
            S::TimeMicros => Node::Time(Unit::Micros),
            S::TimestampMillis => Node::Timestamp { unit: Unit::Millis, local: false },
            S::TimestampMicros => Node::Timestamp { unit: Unit::Micros, local: false },
            S::TimestampNanos => Node::Timestamp { unit: Unit::Nanos, local: false },
            S::LocalTimestampMillis => Node::Timestamp { unit: Unit::Millis, local: true },
            S::LocalTimestampMicros => Node::Timestamp { unit: Unit::Micros, local: true },
            S::LocalTimestampNanos => Node::Timestamp { unit: Unit::Nanos, local: true },
            S::Duration(_) => Node::Duration,
            S::Ref { name } => {
                let found = self.names.get(name).copied();
                let found = found.ok_or_else(|| SchemaError(format!("the type {name} is not defined")))?;
                return self.node(found, selected);
            }
        };
        Ok(self.push(node))
    }

    fn record(
        &mut self,
        record: &'a RecordSchema,
        selected: Option<&Selected>,
    ) -> Result<NodeId, SchemaError> {
        let key = match selected {
            None => Some((&record.name, false)),
            Some(Selected::Whole) => Some((&record.name, true)),
            Some(Selected::Members(_)) => None,
        };
        if let Some(id) = key.and_then(|key| self.whole.get(&key)) {
            return Ok(*id);
        }
        // The id is known before the fields are compiled, which may refer to it.
        let id = self.push(Node::Null);
        if let Some(key) = key {
            self.whole.insert(key, id);
        }
        let mut fields = Vec::with_capacity(record.fields.len());
        for field in &record.fields {
            let selected = selected.and_then(|selected| selected.member(&field.name));
            let json = serde_json::Value::from(field.name.as_str());
            fields.push(Field {
                name: field.name.as_str().into(),
                member: selected.map(|_| format!("{json}:").into()),
                node: self.node(&field.schema, selected)?,
            });
        }
        self.nodes[id as usize] = Node::Record(fields);
        Ok(id)
    }
}
