//! What all resources have in common (J-1, J-4).

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::object::{OrDefault, objects};
use super::text::{Text, TextMap};

/// A stored document. The key decides the type; `kind` and `apiVersion` are not looked at (J-1).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Resource<'a, S> {
    pub metadata: Meta<'a>,
    pub spec: S,
}

objects! {
    /// `metadata`, as far as the agent reads it.
    pub struct Meta<'a> {
        "name" name: Text<'a>,
        "namespace" namespace: Text<'a>,
        "labels" labels: TextMap<'a>,
        "annotations" annotations: TextMap<'a>,
    }
}

/// The only struct with a parameter, and so the only one that the macro does not write.
impl<'de: 'a, 'a, S: Deserialize<'de> + Default> Deserialize<'de> for Resource<'a, S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ResourceVisitor<S>(PhantomData<S>);

        impl<'de, S: Deserialize<'de> + Default> Visitor<'de> for ResourceVisitor<S> {
            type Value = Resource<'de, S>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Resource<'de, S>, A::Error> {
                let mut resource = Resource::default();
                while let Some(field) = map.next_key()? {
                    match field {
                        Field::Metadata => resource.metadata = map.next_value::<OrDefault<Meta<'de>>>()?.0,
                        Field::Spec => resource.spec = map.next_value::<OrDefault<S>>()?.0,
                        Field::Unknown => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(resource)
            }
        }

        deserializer.deserialize_map(ResourceVisitor(PhantomData))
    }
}

enum Field {
    Metadata,
    Spec,
    Unknown,
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldVisitor;

        impl Visitor<'_> for FieldVisitor {
            type Value = Field;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<Field, E> {
                Ok(match key {
                    "metadata" => Field::Metadata,
                    "spec" => Field::Spec,
                    _ => Field::Unknown,
                })
            }
        }

        deserializer.deserialize_identifier(FieldVisitor)
    }
}
