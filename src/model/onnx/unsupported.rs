//! The operators of a graph that neither tract nor kandle has.

use std::collections::BTreeMap;

use tract_onnx::model::OnnxOpRegister;
use tract_onnx::pb::{GraphProto, NodeProto};

use super::graph::Graph;

/// Nodes that are named for one operator.
const NAMED: usize = 3;

/// Operators without an implementation, each with the names of some of its nodes: `Foo (node_1, node_7)`; sorted.
pub fn unsupported(graph: &Graph, operators: &OnnxOpRegister) -> Vec<String> {
    let mut missing: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in graph.nodes() {
        add(node, operators, &mut missing);
    }
    missing.into_iter().map(|(operator, nodes)| line(&operator, &nodes)).collect()
}

fn add(node: &NodeProto, operators: &OnnxOpRegister, missing: &mut BTreeMap<String, Vec<String>>) {
    if !operators.0.contains_key(&node.op_type) {
        let operator = match node.domain.as_str() {
            "" | "ai.onnx" => node.op_type.clone(),
            domain => format!("{domain}.{}", node.op_type),
        };
        let name = if node.name.is_empty() { node.output.first() } else { Some(&node.name) };
        missing.entry(operator).or_default().push(name.cloned().unwrap_or_default());
    }
    let bodies = node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs));
    for GraphProto { node, .. } in bodies {
        node.iter().for_each(|node| add(node, operators, missing));
    }
}

fn line(operator: &str, nodes: &[String]) -> String {
    let more = nodes.len().saturating_sub(NAMED);
    let named = nodes[..nodes.len() - more].join(", ");
    match more {
        0 => format!("{operator} ({named})"),
        _ => format!("{operator} ({named} and {more} more)"),
    }
}

#[cfg(test)]
mod tests {
    use tract_onnx::pb::{AttributeProto, ModelProto};

    use super::*;

    fn node(domain: &str, operator: &str, name: &str, body: Option<GraphProto>) -> NodeProto {
        NodeProto {
            domain: domain.to_owned(),
            op_type: operator.to_owned(),
            name: name.to_owned(),
            output: vec![format!("{name}.out")],
            attribute: vec![AttributeProto { g: body, ..AttributeProto::default() }],
            ..NodeProto::default()
        }
    }

    #[test]
    fn operators_are_named_with_their_nodes_and_those_of_bodies() {
        let body = GraphProto { node: vec![node("", "Foo", "inner", None)], ..GraphProto::default() };
        let mut nodes = vec![node("", "Relu", "r", None), node("", "If", "branch", Some(body))];
        nodes.extend((0..4).map(|i| node("com.example", "Bar", &format!("bar{i}"), None)));
        let graph = GraphProto { node: nodes, ..GraphProto::default() };
        let graph = Graph::new(ModelProto { graph: Some(graph), ..ModelProto::default() }).unwrap();
        let found = unsupported(&graph, &tract_onnx::onnx().op_register);
        assert_eq!(found, ["Foo (inner)", "com.example.Bar (bar0, bar1, bar2 and 1 more)"]);
    }
}
