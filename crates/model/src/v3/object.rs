//! Structs that are read from objects, field by field.
//!
//! Serde's derive does almost this, and differs where it matters: what it makes also takes a list, as the fields in
//! their order, so that a rule written as `[]` would be "allow everything"; and it refuses a key that is repeated,
//! where the writers' own libraries let the last one count.

use serde::{Deserialize, Deserializer};

/// A field whose `null` means the same as its absence (J-2).
pub(super) struct OrDefault<T>(pub(super) T);

impl<'de, T: Deserialize<'de> + Default> Deserialize<'de> for OrDefault<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Option::<T>::deserialize(deserializer).map(|value| Self(value.unwrap_or_default()))
    }
}

/// Declares structs with the key of each field in front of it, and how they are read: unknown keys are ignored, a
/// missing field and `null` are the zero value (J-2), of a key that occurs twice the last one counts, and a wrong
/// type anywhere makes the whole document unparsable (J-3).
macro_rules! objects {
    ($(
        $(#[$attribute:meta])*
        pub struct $name:ident $(<$lifetime:lifetime>)? {
            $($(#[$field_attribute:meta])* $key:literal $field:ident: $type:ty,)*
        }
    )*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct $name $(<$lifetime>)? {
            $($(#[$field_attribute])* pub $field: $type,)*
        }

        impl<'de $(: $lifetime)?, $($lifetime)?> serde::Deserialize<'de> for $name $(<$lifetime>)? {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[allow(non_camel_case_types, reason = "named after the fields")]
                enum Field {
                    $($field,)*
                    Unknown,
                }

                struct FieldVisitor;

                impl serde::de::Visitor<'_> for FieldVisitor {
                    type Value = Field;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("a key")
                    }

                    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<Field, E> {
                        Ok(match key {
                            $($key => Field::$field,)*
                            _ => Field::Unknown,
                        })
                    }
                }

                impl<'de> serde::Deserialize<'de> for Field {
                    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                        deserializer.deserialize_identifier(FieldVisitor)
                    }
                }

                struct ObjectVisitor<T>(std::marker::PhantomData<T>);

                impl<'de $(: $lifetime)?, $($lifetime)?> serde::de::Visitor<'de>
                    for ObjectVisitor<$name $(<$lifetime>)?>
                {
                    type Value = $name $(<$lifetime>)?;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("an object")
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                        let mut value = $name::default();
                        while let Some(field) = map.next_key()? {
                            match field {
                                $(Field::$field => {
                                    value.$field = map.next_value::<$crate::v3::object::OrDefault<$type>>()?.0;
                                })*
                                Field::Unknown => {
                                    map.next_value::<serde::de::IgnoredAny>()?;
                                }
                            }
                        }
                        Ok(value)
                    }
                }

                deserializer.deserialize_map(ObjectVisitor(std::marker::PhantomData))
            }
        }
    )*};
}
pub(super) use objects;
