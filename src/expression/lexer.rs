//! Text to tokens.

use super::ParseError;

/// A token and the character where it starts, from 1.
pub(super) type Spanned = (usize, Token);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    Name(String),
    Text(String),
    Integer(i64),
    Equal,
    NotEqual,
    And,
    Or,
    Not,
    Minus,
    Dot,
    Comma,
    Open,
    Close,
    OpenIndex,
    CloseIndex,
}

struct Lexer {
    characters: Vec<char>,
    next: usize,
}

pub(super) fn tokens(source: &str) -> Result<Vec<Spanned>, ParseError> {
    let mut lexer = Lexer {
        characters: source.chars().collect(),
        next: 0,
    };
    let mut tokens = Vec::new();
    while let Some(character) = lexer.take() {
        if character.is_whitespace() {
            continue;
        }
        let at = lexer.next;
        tokens.push((at, lexer.token(character, at)?));
    }
    Ok(tokens)
}

fn syntax<T>(at: usize, problem: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError::Syntax {
        at,
        problem: problem.into(),
    })
}

impl Lexer {
    fn peek(&self) -> Option<char> {
        self.characters.get(self.next).copied()
    }

    fn take(&mut self) -> Option<char> {
        let character = self.peek()?;
        self.next += 1;
        Some(character)
    }

    fn take_while(&mut self, accept: impl Fn(char) -> bool) -> String {
        let mut text = String::new();
        while let Some(character) = self.peek().filter(|c| accept(*c)) {
            text.push(character);
            self.next += 1;
        }
        text
    }

    fn double(&mut self, second: char, token: Token, at: usize) -> Result<Token, ParseError> {
        if self.peek() == Some(second) {
            self.next += 1;
            return Ok(token);
        }
        syntax(at, format!("expected {second:?} twice"))
    }

    fn token(&mut self, first: char, at: usize) -> Result<Token, ParseError> {
        match first {
            '=' => self.double('=', Token::Equal, at),
            '&' => self.double('&', Token::And, at),
            '|' => self.double('|', Token::Or, at),
            '!' if self.peek() == Some('=') => {
                self.next += 1;
                Ok(Token::NotEqual)
            }
            '!' => Ok(Token::Not),
            '-' => Ok(Token::Minus),
            '.' => Ok(Token::Dot),
            ',' => Ok(Token::Comma),
            '(' => Ok(Token::Open),
            ')' => Ok(Token::Close),
            '[' => Ok(Token::OpenIndex),
            ']' => Ok(Token::CloseIndex),
            '"' => self.quoted(at),
            '`' => {
                let text = self.take_while(|c| c != '`');
                match self.take() {
                    Some(_) => Ok(Token::Text(text)),
                    None => syntax(at, "the string does not end"),
                }
            }
            '0'..='9' => {
                let rest = self.take_while(|c| c.is_ascii_alphanumeric() || c == '.' || c == '_');
                match format!("{first}{rest}").parse() {
                    Ok(number) => Ok(Token::Integer(number)),
                    Err(_) => syntax(at, "not a decimal integer"),
                }
            }
            _ if first == '_' || first.is_alphabetic() => {
                let rest = self.take_while(|c| c == '_' || c.is_alphanumeric());
                Ok(Token::Name(format!("{first}{rest}")))
            }
            _ => syntax(at, format!("unexpected {first:?}")),
        }
    }

    /// The rest of a Go string literal.
    fn quoted(&mut self, at: usize) -> Result<Token, ParseError> {
        let mut text = String::new();
        loop {
            match self.take() {
                None | Some('\n') => return syntax(at, "the string does not end"),
                Some('"') => return Ok(Token::Text(text)),
                Some('\\') => text.push(self.escape()?),
                Some(character) => text.push(character),
            }
        }
    }

    fn escape(&mut self) -> Result<char, ParseError> {
        let at = self.next;
        Ok(match self.take() {
            Some('a') => '\u{7}',
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('v') => '\u{b}',
            Some(same @ ('\\' | '"')) => same,
            Some('x') => return self.code_point(2, at),
            Some('u') => return self.code_point(4, at),
            Some('U') => return self.code_point(8, at),
            _ => return syntax(at, "unknown escape in a string"),
        })
    }

    fn code_point(&mut self, digits: usize, at: usize) -> Result<char, ParseError> {
        let mut text = String::new();
        for _ in 0..digits {
            text.extend(self.take().filter(char::is_ascii_hexdigit));
        }
        u32::from_str_radix(&text, 16)
            .ok()
            // A byte above 0x7f would be half a character.
            .filter(|code| text.len() == digits && (digits > 2 || *code < 0x80))
            .and_then(char::from_u32)
            .map_or_else(|| syntax(at, "malformed escape in a string"), Ok)
    }
}
