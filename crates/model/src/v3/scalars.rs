//! Scalars that JSON writes in more than one way (J-2, J-5).

use std::fmt;

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

use super::text::Text;

/// Longest name of a port in a stored document.
const MAX_PORT_NAME: usize = 128;

/// A protocol: a number from 0 to 255, as number or text, or a name in any letter case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol<'a> {
    Number(u8),
    Name(Text<'a>),
}

/// What is left out counts as number 0.
impl Default for Protocol<'_> {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl fmt::Display for Protocol<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl<'a> From<Text<'a>> for Protocol<'a> {
    fn from(text: Text<'a>) -> Self {
        digits(&text).and_then(|text| text.parse().ok()).map_or_else(|| Self::Name(text.clone()), Self::Number)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Protocol<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ProtocolVisitor;

        impl<'de> Visitor<'de> for ProtocolVisitor {
            type Value = Protocol<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a protocol number from 0 to 255 or a protocol name")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                match u8::try_from(number) {
                    Ok(number) => Ok(Protocol::Number(number)),
                    Err(_) => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
                }
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text::from(text).into())
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text::from(text.to_owned()).into())
            }
        }

        deserializer.deserialize_any(ProtocolVisitor)
    }
}

/// A port of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Port<'a> {
    /// First and last, in this order.
    Range(u16, u16),
    Named(Text<'a>),
}

impl<'a> Port<'a> {
    fn from_text(text: Text<'a>) -> Option<Self> {
        if let Some(number) = digits(&text) {
            let number = number.parse().ok()?;
            return Some(Self::Range(number, number));
        }
        if let Some((first, last)) = text.split_once(':') {
            let (first, last) = (digits(first)?.parse().ok()?, digits(last)?.parse().ok()?);
            return (first <= last).then_some(Self::Range(first, last));
        }
        is_name(&text, MAX_PORT_NAME).then_some(Self::Named(text))
    }
}

impl fmt::Display for Port<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(first, last) if first == last => write!(f, "{first}"),
            Self::Range(first, last) => write!(f, "{first}:{last}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Port<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortVisitor;

        impl<'de> Visitor<'de> for PortVisitor {
            type Value = Port<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port from 0 to 65535, a range such as \"80:90\", or the name of a port")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                match u16::try_from(number) {
                    Ok(number) => Ok(Port::Range(number, number)),
                    Err(_) => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
                }
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Port::from_text(text.into()).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                let owned = Text::from(text.to_owned());
                Port::from_text(owned).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
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
