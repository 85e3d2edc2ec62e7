//! The tokens of a selector (L-1 to L-7), read on demand.
//!
//! Which words are tokens depends on the position: functions are recognised only where a label could
//! stand, operator words only after a label. The parser therefore asks for what may come next instead of
//! receiving a list. The language is the same.

use super::ParseError;

/// Longest label name in bytes (L-4).
const MAX_LABEL: usize = 512;

/// The part of the text that is not read yet.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    length: usize,
    rest: &'a str,
}

/// What may stand where an operation begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operand<'a> {
    Open,
    All,
    Global,
    Has(&'a str),
    Label(&'a str),
}

/// An operator between a label and a value or set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Equals,
    NotEquals,
    Contains,
    StartsWith,
    EndsWith,
    In,
    NotIn,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { length: text.len(), rest: text }
    }

    /// Returns an error that points at the current position.
    pub(super) fn error(&self, message: &'static str) -> ParseError {
        ParseError { message, at: self.length - self.rest.len() }
    }

    pub(super) fn at_end(&self) -> bool {
        self.rest.is_empty()
    }

    /// Skips blanks and tabs, the only white space outside quotes (L-1).
    pub(super) fn skip_blanks(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    /// Consumes `token` if the text goes on with it.
    pub(super) fn eat(&mut self, token: &str) -> bool {
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// Consumes a run of `!` and tells whether their number is odd (L-9).
    ///
    /// `!=` is preferred over `!` (L-2), but no operation begins with `!=`, so reading the `!` alone
    /// fails just the same at the `=`.
    pub(super) fn negation(&mut self) -> bool {
        let mut odd = false;
        self.skip_blanks();
        while self.eat("!") {
            odd = !odd;
            self.skip_blanks();
        }
        odd
    }

    /// Reads a function, an opening bracket or a label (L-4, L-5).
    pub(super) fn operand(&mut self) -> Result<Operand<'a>, ParseError> {
        self.skip_blanks();
        if self.eat("(") {
            return Ok(Operand::Open);
        }
        if self.eat("has(") {
            self.skip_blanks();
            let label = self.label("expected a label name in has()")?;
            self.close_function()?;
            return Ok(Operand::Has(label));
        }
        if self.eat("all(") {
            self.close_function()?;
            return Ok(Operand::All);
        }
        if self.eat("global(") {
            self.close_function()?;
            return Ok(Operand::Global);
        }
        self.label("expected a label name, a function or a bracket").map(Operand::Label)
    }

    fn close_function(&mut self) -> Result<(), ParseError> {
        self.skip_blanks();
        if self.eat(")") { Ok(()) } else { Err(self.error("expected `)` after a function")) }
    }

    fn label(&mut self, expected: &'static str) -> Result<&'a str, ParseError> {
        let after = self.rest.trim_start_matches(is_label_char);
        let label = self.rest.strip_suffix(after).unwrap_or_default();
        if label.is_empty() {
            return Err(self.error(expected));
        }
        if label.len() > MAX_LABEL {
            return Err(self.error("label name longer than 512 bytes"));
        }
        self.rest = after;
        Ok(label)
    }

    /// Reads the operator after a label (L-2, L-6).
    ///
    /// An operator word must end at a word boundary; that needs no test here, because only a quote or
    /// `{` may follow, and neither can be part of a word.
    pub(super) fn operator(&mut self) -> Result<Operator, ParseError> {
        self.skip_blanks();
        if self.eat("==") {
            return Ok(Operator::Equals);
        }
        if self.eat("!=") {
            return Ok(Operator::NotEquals);
        }
        if self.eat("contains") {
            return Ok(Operator::Contains);
        }
        let start = self.clone();
        for (first, second, operator) in [
            ("starts", "with", Operator::StartsWith),
            ("ends", "with", Operator::EndsWith),
            ("not", "in", Operator::NotIn),
            ("", "in", Operator::In),
        ] {
            if self.eat(first) {
                self.skip_blanks();
                if self.eat(second) {
                    return Ok(operator);
                }
            }
            *self = start.clone();
        }
        Err(self.error("expected an operator after the label name"))
    }

    /// Reads a quoted string if one comes next (L-3); it has no escapes.
    pub(super) fn string(&mut self) -> Result<Option<&'a str>, ParseError> {
        self.skip_blanks();
        let quote = match self.rest.chars().next() {
            Some(quote @ ('"' | '\'')) => quote,
            Some(_) | None => return Ok(None),
        };
        let mut parts = self.rest.splitn(3, quote);
        // The first part is the nothing before the opening quote.
        match (parts.next(), parts.next(), parts.next()) {
            (Some(_), Some(value), Some(rest)) => {
                self.rest = rest;
                Ok(Some(value))
            }
            (_, _, _) => Err(self.error("missing closing quote")),
        }
    }
}

/// L-4.
fn is_label_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '/' | '-')
}
