//! Scalars that JSON writes in more than one way (J-2, J-5).

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// Longest name of a port in a stored document.
const MAX_PORT_NAME: usize = 128;

/// Reads a field whose `null` means the same as its absence (J-2).
///
/// # Errors
///
/// If the value is neither `null` nor a `T`.
pub fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Reads a map of texts; a `null` value reads as the empty text (J-2).
///
/// # Errors
///
/// If the value is neither `null` nor an object of texts.
pub fn string_map<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    let map = Option::<BTreeMap<String, Option<String>>>::deserialize(deserializer)?.unwrap_or_default();
    Ok(map.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect())
}

/// Reads an object and nothing else.
///
/// What the derive makes for a struct also takes a list, as the fields in their order, and an empty list
/// for a struct of nothing but zero values. A rule written as `[]` would then be "allow everything".
/// So the derive is told `remote = "Self"`, which leaves its function without the trait, and
/// [`objects`] implements the trait in terms of this one.
pub(super) fn object<'de, D: Deserializer<'de>, T: FromObject<'de>>(deserializer: D) -> Result<T, D::Error> {
    struct ObjectVisitor<T>(std::marker::PhantomData<T>);

    impl<'de, T: FromObject<'de>> Visitor<'de> for ObjectVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::from_object(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_map(ObjectVisitor(std::marker::PhantomData))
}

/// The function of the derive, under a name of its own.
pub(super) trait FromObject<'de>: Sized {
    fn from_object<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

/// Makes structs that derive `Deserialize` with `remote = "Self"` readable from objects only.
macro_rules! objects {
    ($($name:ty),* $(,)?) => {$(
        impl<'de> $crate::v3::scalars::FromObject<'de> for $name {
            fn from_object<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                // The inherent function wins over the one of the trait.
                <$name>::deserialize(deserializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::v3::scalars::object(deserializer)
            }
        }
    )*};
}
pub(super) use objects;

/// A protocol: a number from 0 to 255, as number or text, or a name in any letter case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    Number(u8),
    Name(String),
}

/// What is left out counts as number 0.
impl Default for Protocol {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ProtocolVisitor;

        impl Visitor<'_> for ProtocolVisitor {
            type Value = Protocol;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a protocol number from 0 to 255 or a protocol name")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Protocol, E> {
                match u8::try_from(number) {
                    Ok(number) => Ok(Protocol::Number(number)),
                    Err(_) => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
                }
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Protocol, E> {
                Ok(match digits(text).and_then(|text| text.parse().ok()) {
                    Some(number) => Protocol::Number(number),
                    None => Protocol::Name(text.to_owned()),
                })
            }
        }

        deserializer.deserialize_any(ProtocolVisitor)
    }
}

/// A port of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Port {
    /// First and last, in this order.
    Range(u16, u16),
    Named(String),
}

impl Port {
    fn from_text(text: &str) -> Option<Self> {
        if let Some(number) = digits(text) {
            let number = number.parse().ok()?;
            return Some(Self::Range(number, number));
        }
        if let Some((first, last)) = text.split_once(':') {
            let (first, last) = (digits(first)?.parse().ok()?, digits(last)?.parse().ok()?);
            return (first <= last).then_some(Self::Range(first, last));
        }
        is_name(text, MAX_PORT_NAME).then(|| Self::Named(text.to_owned()))
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(first, last) if first == last => write!(f, "{first}"),
            Self::Range(first, last) => write!(f, "{first}:{last}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;

        impl Visitor<'_> for PortVisitor {
            type Value = Port;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port from 0 to 65535, a range such as \"80:90\", or the name of a port")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Port, E> {
                match u16::try_from(number) {
                    Ok(number) => Ok(Port::Range(number, number)),
                    Err(_) => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
                }
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Port, E> {
                Port::from_text(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_any(PortVisitor)
    }
}

/// A number or text that is only carried or checked for its type, such as a DSCP.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum NumberOrText {
    Number(u8),
    Text(String),
}

impl fmt::Display for NumberOrText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// Returns the text if it is not empty and nothing but decimal digits.
fn digits(text: &str) -> Option<&str> {
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())).then_some(text)
}

/// Tells whether a text is made of 1 to `longest` bytes of `a-z A-Z 0-9 _ . -`.
pub(crate) fn is_name(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}
