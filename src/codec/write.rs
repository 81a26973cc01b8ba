//! Encodes predictions. A task writes its prediction as a JSON object.

/// Adds members (`,"name":value`…) to the JSON object at the end of `out`.
pub fn include(members: &str, out: &mut Vec<u8>) {
    if !members.is_empty() {
        out.pop();
        out.extend_from_slice(members.as_bytes());
        out.push(b'}');
    }
}
