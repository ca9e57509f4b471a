//! A Rust file as a flat row of tokens: comments gone, strings whole, every token with its line.
//! Enough for every rule here; nothing is resolved or expanded.

use crate::tree::File;
use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// One token; a group appears as its opening token, its content, its closing token.
#[derive(Debug)]
pub struct Token {
    pub text: String,
    /// Counts from 1.
    pub line: usize,
    pub is_literal: bool,
}

/// The tokens of one file and where it is test code.
pub struct Rust {
    pub path: String,
    pub tokens: Vec<Token>,
    /// The whole file is compiled for tests only.
    pub test_only: bool,
    /// First and last lines of the parts under `#[cfg(test)]`.
    test_parts: Vec<(usize, usize)>,
}

impl Rust {
    /// Fails with a reason where the text is no row of Rust tokens.
    pub fn parse(file: &File) -> Result<Self, String> {
        let stream: TokenStream =
            file.text.parse().map_err(|error| format!("not Rust: {error}"))?;
        let mut tokens = Vec::new();
        flatten(stream, &mut tokens);
        let test_parts = test_parts(&tokens);
        let test_only = is_test_path(&file.path);
        Ok(Self { path: file.path.clone(), tokens, test_only, test_parts })
    }

    #[cfg(test)]
    pub fn of(path: &str, text: &str) -> Self {
        Self::parse(&File::of(path, text)).expect("Rust")
    }

    /// Whether what stands on `line` is built for tests only.
    pub fn is_test(&self, line: usize) -> bool {
        self.test_only
            || self.test_parts.iter().any(|(first, last)| (first..=last).contains(&&line))
    }

    /// Indices of the tokens at which these texts stand one after another.
    pub fn find<'a>(&'a self, texts: &'a [&str]) -> impl Iterator<Item = usize> + 'a {
        (0..self.tokens.len()).filter(move |&start| self.stands_at(start, texts))
    }

    /// Whether these texts stand one after another from `start`; a literal equals no text.
    pub fn stands_at(&self, start: usize, texts: &[&str]) -> bool {
        texts.iter().enumerate().all(|(offset, text)| {
            self.tokens
                .get(start + offset)
                .is_some_and(|token| !token.is_literal && token.text == *text)
        })
    }

    /// Name, first and last line of each function that has a body.
    pub fn functions(&self) -> Vec<(&str, usize, usize)> {
        let mut found = Vec::new();
        for start in self.find(&["fn"]) {
            let Some(name) = self.tokens.get(start + 1) else { continue };
            let is_pointer_type = name.text == "(";
            if let (false, Some(end)) = (is_pointer_type, item_end(&self.tokens, start)) {
                let (first, last) = (self.tokens[start].line, self.tokens[end].line);
                if self.tokens[end].text == "}" {
                    found.push((name.text.as_str(), first, last));
                }
            }
        }
        found
    }
}

fn is_test_path(path: &str) -> bool {
    path.split('/').any(|part| matches!(part, "tests" | "tests.rs" | "benches"))
}

fn flatten(stream: TokenStream, tokens: &mut Vec<Token>) {
    for tree in stream {
        let line = tree.span().start().line;
        let token = |text: &str, line| Token { text: text.to_owned(), line, is_literal: false };
        match tree {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                tokens.push(token(open, line));
                flatten(group.stream(), tokens);
                tokens.push(token(close, group.span_close().end().line));
            }
            TokenTree::Literal(literal) => {
                tokens.push(Token { text: literal.to_string(), line, is_literal: true });
            }
            TokenTree::Ident(ident) => tokens.push(token(&ident.to_string(), line)),
            TokenTree::Punct(punct) => tokens.push(token(&punct.as_char().to_string(), line)),
        }
    }
}

/// The token that ends the item that starts at `start`: its body's brace or its semicolon.
fn item_end(tokens: &[Token], start: usize) -> Option<usize> {
    let mut depth = 0;
    let mut has_body = false;
    for (index, token) in tokens.iter().enumerate().skip(start).filter(|(_, t)| !t.is_literal) {
        match token.text.as_str() {
            "{" => {
                has_body |= depth == 0;
                depth += 1;
            }
            "(" | "[" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        let ends = if token.text == "}" { has_body } else { token.text == ";" };
        if depth == 0 && ends {
            return Some(index);
        }
    }
    None
}

fn test_parts(tokens: &[Token]) -> Vec<(usize, usize)> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut parts = Vec::new();
    for start in 0..tokens.len().saturating_sub(MARK.len()) {
        let texts = tokens[start..start + MARK.len()].iter().map(|token| token.text.as_str());
        if texts.eq(MARK) {
            let end = item_end(tokens, start + MARK.len()).unwrap_or(tokens.len() - 1);
            parts.push((tokens[start].line, tokens[end].line));
        }
    }
    parts
}

#[test]
fn sees_bodies_but_not_signatures_or_function_types() {
    let text = "trait T {\n fn a(&self);\n fn b(x: [u8; 2]) -> fn(u8) {\n  {}\n }\n}\nfn c() {}";
    let rust = Rust::of("a/src/b.rs", text);
    assert_eq!(rust.functions(), [("b", 3, 5), ("c", 7, 7)]);
}

#[test]
fn keeps_braces_in_strings_and_comments_out() {
    let rust = Rust::of("a/src/b.rs", "fn a() {\n let x = \"}\"; // }\n let y = '{';\n}\n");
    assert_eq!(rust.functions(), [("a", 1, 4)]);
}

#[test]
fn knows_which_lines_are_tests() {
    let text = "fn a() {}\n#[cfg(test)]\nmod t {\n fn b() {}\n}\nfn c() {}\n#[cfg(test)]\nuse x;\n";
    let rust = Rust::of("a/src/b.rs", text);
    let lines: Vec<bool> = (1..=8).map(|line| rust.is_test(line)).collect();
    assert_eq!(lines, [false, true, true, true, true, false, true, true]);
    assert!(Rust::of("a/tests/b.rs", "fn a() {}").is_test(1));
}

#[test]
fn refuses_what_is_not_rust() {
    assert!(Rust::parse(&File::of("a.rs", "fn a( {")).is_err());
}
