//! Which members of a value are needed, so that a reader can skip all others.

use std::collections::BTreeMap;

/// A selection from a value of any type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selected {
    Whole,
    /// These members of an object, by name. Of anything but an object, the whole value.
    Members(BTreeMap<String, Selected>),
}

impl Selected {
    /// What these JSON Pointers select together.
    pub fn new<'a>(pointers: impl IntoIterator<Item = &'a str>) -> Self {
        let mut all = Self::Members(BTreeMap::new());
        for pointer in pointers {
            all.add(&tokens(pointer));
        }
        all
    }

    fn add(&mut self, names: &[String]) {
        match (names, &mut *self) {
            (_, Self::Whole) => {}
            ([], _) => *self = Self::Whole,
            ([first, rest @ ..], Self::Members(members)) => {
                let member = members.entry(first.clone());
                member.or_insert_with(|| Self::Members(BTreeMap::new())).add(rest);
            }
        }
    }

    /// What is selected of the member `name`; `None` if nothing is.
    pub fn member(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Whole => Some(&Self::Whole),
            Self::Members(members) => members.get(name),
        }
    }
}

/// The reference tokens of a JSON Pointer, as the names that they stand for (RFC 6901, 4).
pub fn tokens(pointer: &str) -> Vec<String> {
    let tokens = pointer.strip_prefix('/').map(|path| path.split('/'));
    tokens.into_iter().flatten().map(unescape).collect()
}

/// The name that a reference token stands for.
pub fn unescape(token: &str) -> String {
    token.replace("~1", "/").replace("~0", "~")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_select_together() {
        let selected = Selected::new(["/a/b", "/a/c", "/d~1e", "/d~1e/f"]);
        assert_eq!(selected.member("a").and_then(|a| a.member("b")), Some(&Selected::Whole));
        assert_eq!(selected.member("a").and_then(|a| a.member("x")), None);
        assert_eq!(selected.member("d/e"), Some(&Selected::Whole));
        assert_eq!(selected.member("x"), None);
        assert_eq!(Selected::new(["/a", ""]), Selected::Whole);
        assert_eq!(Selected::new([]).member("a"), None);
    }
}
