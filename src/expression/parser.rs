//! Tokens to a syntax tree.

use super::lexer::{Spanned, Token};
use super::{MAX_DEPTH, ParseError};

/// A node of the syntax tree, where it starts, and how deep it is.
#[derive(Debug)]
pub(crate) struct Raw {
    /// The character where it starts, from 1.
    pub(crate) at: usize,
    pub(crate) kind: RawKind,
    depth: usize,
}

#[derive(Debug)]
pub(crate) enum RawKind {
    Text(String),
    Integer(i64),
    Name(String),
    Member(Box<Raw>, String),
    Index(Box<Raw>, Box<Raw>),
    Call(Box<Raw>, Vec<Raw>),
    Not(Box<Raw>),
    All(Vec<Raw>),
    Any(Vec<Raw>),
    Equal {
        left: Box<Raw>,
        right: Box<Raw>,
        negated: bool,
    },
}

impl Raw {
    /// The names of `a.b.c`; `None` for anything else.
    pub(crate) fn dotted(&self) -> Option<Vec<&str>> {
        match &self.kind {
            RawKind::Name(name) => Some(vec![name]),
            RawKind::Member(object, name) => {
                let mut names = object.dotted()?;
                names.push(name);
                Some(names)
            }
            _ => None,
        }
    }
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Spanned>>,
    end: usize,
    depth: usize,
}

/// Parses all `tokens` of a text with `length` characters.
pub(super) fn parse(tokens: Vec<Spanned>, length: usize) -> Result<Raw, ParseError> {
    let mut parser = Parser {
        tokens: tokens.into_iter().peekable(),
        end: length + 1,
        depth: 0,
    };
    let raw = parser.any()?;
    match parser.tokens.next() {
        None => Ok(raw),
        Some((at, token)) => syntax(at, format!("unexpected {}", show(&token))),
    }
}

fn syntax<T>(at: usize, problem: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError::Syntax {
        at,
        problem: problem.into(),
    })
}

fn show(token: &Token) -> String {
    match token {
        Token::Name(name) => format!("{name:?}"),
        Token::Text(_) => "string".to_owned(),
        Token::Integer(number) => number.to_string(),
        Token::Equal => "\"==\"".to_owned(),
        Token::NotEqual => "\"!=\"".to_owned(),
        Token::And => "\"&&\"".to_owned(),
        Token::Or => "\"||\"".to_owned(),
        Token::Not => "\"!\"".to_owned(),
        Token::Minus => "\"-\"".to_owned(),
        Token::Dot => "\".\"".to_owned(),
        Token::Comma => "\",\"".to_owned(),
        Token::Open => "\"(\"".to_owned(),
        Token::Close => "\")\"".to_owned(),
        Token::OpenIndex => "\"[\"".to_owned(),
        Token::CloseIndex => "\"]\"".to_owned(),
    }
}

fn leaf(at: usize, kind: RawKind) -> Raw {
    Raw { at, kind, depth: 1 }
}

/// A node above `below`, whose deepest child has depth `below`.
fn above(at: usize, kind: RawKind, below: usize) -> Result<Raw, ParseError> {
    if below >= MAX_DEPTH {
        return Err(ParseError::TooDeep);
    }
    Ok(Raw {
        at,
        kind,
        depth: below + 1,
    })
}

fn deepest(nodes: &[Raw]) -> usize {
    nodes.iter().map(|node| node.depth).max().unwrap_or(0)
}

impl Parser {
    fn at(&mut self) -> usize {
        let end = self.end;
        self.tokens.peek().map_or(end, |(at, _)| *at)
    }

    fn accept(&mut self, token: &Token) -> bool {
        self.tokens.next_if(|(_, next)| next == token).is_some()
    }

    fn expect(&mut self, token: &Token) -> Result<(), ParseError> {
        if self.accept(token) {
            return Ok(());
        }
        let at = self.at();
        syntax(at, format!("expected {}", show(token)))
    }

    /// Runs `parse` one level deeper.
    fn nested<T>(
        &mut self,
        parse: impl FnOnce(&mut Self) -> Result<T, ParseError>,
    ) -> Result<T, ParseError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ParseError::TooDeep);
        }
        let result = parse(self)?;
        self.depth -= 1;
        Ok(result)
    }

    fn any(&mut self) -> Result<Raw, ParseError> {
        self.list(&Token::Or, Self::all, RawKind::Any)
    }

    fn all(&mut self) -> Result<Raw, ParseError> {
        self.list(&Token::And, Self::equality, RawKind::All)
    }

    fn list(
        &mut self,
        operator: &Token,
        operand: fn(&mut Self) -> Result<Raw, ParseError>,
        kind: fn(Vec<Raw>) -> RawKind,
    ) -> Result<Raw, ParseError> {
        let first = operand(self)?;
        if self
            .tokens
            .peek()
            .is_none_or(|(_, token)| token != operator)
        {
            return Ok(first);
        }
        let at = first.at;
        let mut operands = vec![first];
        while self.accept(operator) {
            operands.push(operand(self)?);
        }
        let below = deepest(&operands);
        above(at, kind(operands), below)
    }

    fn equality(&mut self) -> Result<Raw, ParseError> {
        let mut left = self.unary()?;
        loop {
            let negated = if self.accept(&Token::Equal) {
                false
            } else if self.accept(&Token::NotEqual) {
                true
            } else {
                return Ok(left);
            };
            let right = self.unary()?;
            let (at, below) = (left.at, left.depth.max(right.depth));
            let kind = RawKind::Equal {
                left: Box::new(left),
                right: Box::new(right),
                negated,
            };
            left = above(at, kind, below)?;
        }
    }

    fn unary(&mut self) -> Result<Raw, ParseError> {
        let at = self.at();
        if self.accept(&Token::Not) {
            let operand = self.nested(Self::unary)?;
            let below = operand.depth;
            return above(at, RawKind::Not(Box::new(operand)), below);
        }
        if self.accept(&Token::Minus) {
            return match self.tokens.next() {
                Some((_, Token::Integer(number))) => Ok(leaf(at, RawKind::Integer(-number))),
                _ => syntax(at, "expected a number after \"-\""),
            };
        }
        self.postfix()
    }

    fn postfix(&mut self) -> Result<Raw, ParseError> {
        let mut raw = self.primary()?;
        loop {
            let (at, depth) = (raw.at, raw.depth);
            if self.accept(&Token::Dot) {
                let here = self.at();
                let Some((_, Token::Name(name))) = self.tokens.next() else {
                    return syntax(here, "expected a name after \".\"");
                };
                raw = above(at, RawKind::Member(Box::new(raw), name), depth)?;
            } else if self.accept(&Token::OpenIndex) {
                let key = self.nested(Self::any)?;
                self.expect(&Token::CloseIndex)?;
                let below = depth.max(key.depth);
                raw = above(at, RawKind::Index(Box::new(raw), Box::new(key)), below)?;
            } else if self.accept(&Token::Open) {
                let arguments = self.nested(Self::arguments)?;
                let below = depth.max(deepest(&arguments));
                raw = above(at, RawKind::Call(Box::new(raw), arguments), below)?;
            } else {
                return Ok(raw);
            }
        }
    }

    fn arguments(&mut self) -> Result<Vec<Raw>, ParseError> {
        let mut arguments = Vec::new();
        while !self.accept(&Token::Close) {
            arguments.push(self.any()?);
            if !self.accept(&Token::Comma) {
                self.expect(&Token::Close)?;
                break;
            }
        }
        Ok(arguments)
    }

    fn primary(&mut self) -> Result<Raw, ParseError> {
        let end = self.end;
        match self.tokens.next() {
            Some((at, Token::Text(text))) => Ok(leaf(at, RawKind::Text(text))),
            Some((at, Token::Integer(number))) => Ok(leaf(at, RawKind::Integer(number))),
            Some((at, Token::Name(name))) => Ok(leaf(at, RawKind::Name(name))),
            Some((_, Token::Open)) => {
                let raw = self.nested(Self::any)?;
                self.expect(&Token::Close)?;
                Ok(raw)
            }
            Some((at, token)) => syntax(at, format!("unexpected {}", show(&token))),
            None => syntax(end, "the expression ends too early"),
        }
    }
}
