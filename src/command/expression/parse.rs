//! C expressions as text to a tree: operators, casts, members, numbers by C's rules. Knows no kernel.
//!
//! Beyond C: `$REGISTER`; `VAR:CPUS` for per-CPU variables, as crash has it; `ARRAY@COUNT` as gdb has it. No calls and
//! no assignments. Text and tree are bounded, so that neither parsing nor what walks the tree can recurse deep.
//! Source: C11 6.4.4.1 (types of integer constants), 6.5 (precedence).

/// Longest text.
const TEXT_MAX: usize = 4096;
/// Most nodes in a tree, which also bounds its depth.
const NODES_MAX: usize = 256;
/// Deepest nesting of parentheses, brackets and prefixes.
const DEPTH_MAX: usize = 64;

/// A node of an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// A constant.
    Number(Literal),
    /// A variable, function or enumerator.
    Name(String),
    /// `$rip`, without the dollar.
    Register(String),
    /// `-x`, `!x`, `*x`, `&x`, …
    Unary(Unary, Box<Expr>),
    /// `x + y`, …
    Binary(Binary, Box<Expr>, Box<Expr>),
    /// `x.name` and `x->name`, which do the same here, as in gdb.
    Member(Box<Expr>, String),
    /// `x[y]`
    Index(Box<Expr>, Box<Expr>),
    /// `(TYPE) x`
    Cast(String, Box<Expr>),
    /// `sizeof(TYPE)`
    SizeOfType(String),
    /// `sizeof x`
    SizeOf(Box<Expr>),
}

/// An integer constant and its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Literal {
    /// Its value.
    pub value: u64,
    /// Bytes of its type: 4 or 8.
    pub size: u64,
    /// Whether its type has a sign.
    pub signed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are C's.
pub enum Unary {
    Minus,
    Plus,
    Not,
    Complement,
    Follow,
    Address,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are C's.
pub enum Binary {
    Multiply,
    Divide,
    Remainder,
    Add,
    Subtract,
    /// gdb's `@`: as many elements from here.
    Repeat,
    ShiftLeft,
    ShiftRight,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    Equal,
    NotEqual,
    And,
    Xor,
    Or,
    LogicalAnd,
    LogicalOr,
}

/// What was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The tree.
    pub expr: Expr,
    /// `2,4-5` or `a`, as it stood behind a `:`.
    pub cpus: Option<String>,
    /// The text before and after that, to name one CPU's value by; without one, after the first name.
    around: (String, String),
}

impl Parsed {
    /// The expression for one CPU, as it could be typed: `runqueues:2.nr_running`.
    pub fn label(&self, cpu: u32) -> String {
        format!("{}:{cpu}{}", self.around.0, self.around.1)
    }

    /// Whether any name in it fulfils `test`.
    pub fn any_name(&self, test: &dyn Fn(&str) -> bool) -> bool {
        fn walk(expr: &Expr, test: &dyn Fn(&str) -> bool) -> bool {
            match expr {
                Expr::Name(name) => test(name),
                Expr::Number(_) | Expr::Register(_) | Expr::SizeOfType(_) => false,
                Expr::Unary(_, x) | Expr::Member(x, _) | Expr::Cast(_, x) | Expr::SizeOf(x) => walk(x, test),
                Expr::Binary(_, x, y) | Expr::Index(x, y) => walk(x, test) || walk(y, test),
            }
        }
        walk(&self.expr, test)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Number(Literal),
    Name(String),
    Register(String),
    Symbol(&'static str),
}

/// Longest first, so that `<<` is not two `<`.
const SYMBOLS: [&str; 30] = [
    "->", "<<", ">>", "<=", ">=", "==", "!=", "&&", "||", "+", "-", "*", "/", "%", "&", "|", "^", "~", "!",
    "<", ">", "(", ")", "[", "]", ".", "@", ":", ",", "=",
];

/// Words that can begin a type.
const TYPE_WORDS: [&str; 12] = [
    "struct", "union", "enum", "unsigned", "signed", "long", "short", "int", "char", "void", "const",
    "volatile",
];

/// Parses `text`; `is_type` tells whether a name is a type's. The error is half a sentence.
pub fn parse(text: &str, is_type: &dyn Fn(&str) -> bool) -> Result<Parsed, String> {
    if text.len() > TEXT_MAX {
        return Err(format!("it is longer than {TEXT_MAX} bytes"));
    }
    let tokens = tokens(text)?;
    let mut parser =
        Parser { text, tokens, next: 0, nodes: 0, depth: 0, is_type, cpus: None, first_name: None };
    let expr = parser.binary(0)?;
    if let Some((token, at)) = parser.tokens.get(parser.next) {
        return Err(match token {
            Token::Symbol("=") => "assignments are not possible: an expression only reads".to_owned(),
            Token::Symbol("(") => "functions cannot be called".to_owned(),
            _ => unexpected(text, *at),
        });
    }
    let (before, after) = match (&parser.cpus, parser.first_name) {
        (Some((_, from, to)), _) => (*from, *to),
        (None, Some(end)) => (end, end),
        (None, None) => (text.len(), text.len()),
    };
    let piece = |piece: Option<&str>| piece.unwrap_or_default().trim().to_owned();
    let around = (piece(text.get(..before)), piece(text.get(after..)));
    Ok(Parsed { expr, cpus: parser.cpus.map(|(cpus, ..)| cpus), around })
}

fn unexpected(text: &str, at: usize) -> String {
    format!("'{}' is not expected there", text.get(at..).unwrap_or_default().trim())
}

/// The tokens and where each begins.
fn tokens(text: &str) -> Result<Vec<(Token, usize)>, String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        let at = text.len() - rest.len();
        let Some(first) = rest.chars().next() else { return Ok(tokens) };
        let word_end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at_checked(word_end).unwrap_or((rest, ""));
        let token;
        if first.is_ascii_digit() {
            (token, rest) = (Token::Number(number(word)?), after);
        } else if let Some(register) = rest.strip_prefix('$') {
            let end = register.find(|c: char| !is_word(c)).unwrap_or(register.len());
            let (name, after) = register.split_at_checked(end).unwrap_or((register, ""));
            (token, rest) = (Token::Register(name.to_owned()), after);
        } else if !word.is_empty() {
            (token, rest) = (Token::Name(word.to_owned()), after);
        } else if let Some((symbol, after)) = SYMBOLS.iter().find_map(|s| Some((*s, rest.strip_prefix(s)?))) {
            (token, rest) = (Token::Symbol(symbol), after);
        } else {
            return Err(unexpected(text, at));
        }
        tokens.push((token, at));
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// An integer constant: of the types that C allows it, the first that holds it.
fn number(word: &str) -> Result<Literal, String> {
    let wrong = || format!("'{word}' is not a number; hexadecimal ones begin with 0x");
    let lower = word.to_ascii_lowercase();
    let (digits, radix) = match lower.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None if lower.len() > 1 && lower.starts_with('0') => (lower.as_str(), 8),
        None => (lower.as_str(), 10),
    };
    let digits_end = digits.trim_end_matches(['u', 'l']);
    let suffix = digits.strip_prefix(digits_end).ok_or_else(wrong)?;
    let (unsigned, long) = match suffix {
        "" => (false, false),
        "u" => (true, false),
        "l" | "ll" => (false, true),
        "ul" | "ull" | "lu" | "llu" => (true, true),
        _ => return Err(wrong()),
    };
    let value = u64::from_str_radix(digits_end, radix).map_err(|_| wrong())?;
    let literal = |size, signed| Literal { value, size, signed };
    Ok(match value {
        _ if !long && !unsigned && value <= i32::MAX as u64 => literal(4, true),
        _ if !long && (unsigned || radix != 10) && value <= u32::MAX.into() => literal(4, false),
        _ if !unsigned && value <= i64::MAX as u64 => literal(8, true),
        _ => literal(8, false),
    })
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<(Token, usize)>,
    next: usize,
    nodes: usize,
    depth: usize,
    is_type: &'a dyn Fn(&str) -> bool,
    /// What stood behind a `:`, and from where to where it stood, the `:` included.
    cpus: Option<(String, usize, usize)>,
    /// End of the first name.
    first_name: Option<usize>,
}

/// Binary operators by precedence, loosest first.
const LEVELS: [&[(&str, Binary)]; 11] = [
    &[("||", Binary::LogicalOr)],
    &[("&&", Binary::LogicalAnd)],
    &[("|", Binary::Or)],
    &[("^", Binary::Xor)],
    &[("&", Binary::And)],
    &[("==", Binary::Equal), ("!=", Binary::NotEqual)],
    &[("<=", Binary::LessEqual), (">=", Binary::GreaterEqual), ("<", Binary::Less), (">", Binary::Greater)],
    &[("<<", Binary::ShiftLeft), (">>", Binary::ShiftRight)],
    &[("@", Binary::Repeat)],
    &[("+", Binary::Add), ("-", Binary::Subtract)],
    &[("*", Binary::Multiply), ("/", Binary::Divide), ("%", Binary::Remainder)],
];

const PREFIXES: [(&str, Unary); 6] = [
    ("-", Unary::Minus),
    ("+", Unary::Plus),
    ("!", Unary::Not),
    ("~", Unary::Complement),
    ("*", Unary::Follow),
    ("&", Unary::Address),
];

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next).map(|(token, _)| token)
    }

    /// Takes the next token if it is `symbol`.
    fn take(&mut self, symbol: &str) -> bool {
        let there = matches!(self.peek(), Some(Token::Symbol(s)) if *s == symbol);
        self.next += usize::from(there);
        there
    }

    fn expect(&mut self, symbol: &str) -> Result<(), String> {
        if self.take(symbol) { Ok(()) } else { Err(format!("a '{symbol}' is missing")) }
    }

    /// Where token `index` begins; the end of the text behind the last.
    fn position(&self, index: usize) -> usize {
        self.tokens.get(index).map_or(self.text.len(), |(_, at)| *at)
    }

    fn node(&mut self, expr: Expr) -> Result<Expr, String> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(format!("it has more than {NODES_MAX} parts"));
        }
        Ok(expr)
    }

    fn deeper(&mut self) -> Result<(), String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX { Err(format!("it nests deeper than {DEPTH_MAX}")) } else { Ok(()) }
    }

    fn binary(&mut self, level: usize) -> Result<Expr, String> {
        let Some(operators) = LEVELS.get(level) else { return self.prefix() };
        let mut left = self.binary(level + 1)?;
        while let Some((_, operator)) = operators.iter().find(|(symbol, _)| self.take(symbol)) {
            let right = self.binary(level + 1)?;
            left = self.node(Expr::Binary(*operator, Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn prefix(&mut self) -> Result<Expr, String> {
        self.deeper()?;
        let expr = self.prefixed();
        self.depth -= 1;
        expr
    }

    fn prefixed(&mut self) -> Result<Expr, String> {
        if let Some((_, operator)) = PREFIXES.iter().find(|(symbol, _)| self.take(symbol)) {
            let inner = self.prefix()?;
            return self.node(Expr::Unary(*operator, Box::new(inner)));
        }
        if self.peek() == Some(&Token::Name("sizeof".into())) {
            self.next += 1;
            if let Some(ty) = self.type_in_parentheses() {
                return self.node(Expr::SizeOfType(ty));
            }
            let inner = self.prefix()?;
            return self.node(Expr::SizeOf(Box::new(inner)));
        }
        if let Some(ty) = self.type_in_parentheses() {
            let inner = self.prefix()?;
            return self.node(Expr::Cast(ty, Box::new(inner)));
        }
        self.postfix()
    }

    /// `(struct page *)`: takes it, if that is what comes.
    fn type_in_parentheses(&mut self) -> Option<String> {
        let mut at = self.next;
        let mut token = || {
            at += 1;
            self.tokens.get(at - 1).map(|(token, _)| token)
        };
        if token()? != &Token::Symbol("(") {
            return None;
        }
        let Token::Name(first) = token()? else { return None };
        if !TYPE_WORDS.contains(&first.as_str()) && !(self.is_type)(first) {
            return None;
        }
        let mut spelled = first.clone();
        loop {
            match token()? {
                Token::Name(word) => spelled.extend([" ", word]),
                Token::Symbol(symbol @ ("*" | "[" | "]")) => spelled.push_str(symbol),
                Token::Number(number) => spelled.push_str(&number.value.to_string()),
                Token::Symbol(")") => break,
                _ => return None,
            }
        }
        self.next = at;
        Some(spelled)
    }

    fn postfix(&mut self) -> Result<Expr, String> {
        let mut expr = self.primary()?;
        loop {
            if self.take(".") || self.take("->") {
                let Some(Token::Name(name)) = self.peek().cloned() else {
                    return Err("the name of a member is missing".to_owned());
                };
                self.next += 1;
                expr = self.node(Expr::Member(Box::new(expr), name))?;
            } else if self.take("[") {
                let index = self.binary(0)?;
                self.expect("]")?;
                expr = self.node(Expr::Index(Box::new(expr), Box::new(index)))?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn primary(&mut self) -> Result<Expr, String> {
        let Some((token, at)) = self.tokens.get(self.next).cloned() else {
            return Err("it ends too early".to_owned());
        };
        self.next += 1;
        match token {
            Token::Number(literal) => self.node(Expr::Number(literal)),
            Token::Register(name) => self.node(Expr::Register(name)),
            Token::Name(name) if matches!(name.as_str(), "struct" | "union" | "enum") => {
                Err(format!("'{name}' begins a type, and a value is wanted there"))
            }
            Token::Name(name) => {
                self.first_name.get_or_insert(at + name.len());
                if self.take(":") {
                    self.cpu_list()?;
                }
                self.node(Expr::Name(name))
            }
            Token::Symbol("(") => {
                let inner = self.binary(0)?;
                self.expect(")")?;
                Ok(inner)
            }
            Token::Symbol(_) => Err(unexpected(self.text, at)),
        }
    }

    /// What stands behind a `:`: numbers, `-` and `,`, or a word such as `a`.
    fn cpu_list(&mut self) -> Result<(), String> {
        if self.cpus.is_some() {
            return Err("only one of its variables can have a ':CPU'".to_owned());
        }
        let colon = self.position(self.next - 1);
        let start = self.position(self.next);
        let rest = self.text.get(start..).unwrap_or_default();
        let is_list = |c: char| c.is_ascii_digit() || c == '-' || c == ',';
        let len = match rest.strip_prefix(|c: char| c.is_ascii_alphabetic()) {
            Some(_) => rest.find(|c: char| !is_word(c)),
            // `->` is no range.
            None => rest.find(|c: char| !is_list(c)).map(|end| {
                if rest.get(end..).is_some_and(|r| r.starts_with('>')) { end.saturating_sub(1) } else { end }
            }),
        };
        let list = rest.get(..len.unwrap_or(rest.len())).unwrap_or_default();
        if list.is_empty() {
            return Err("the number of a CPU is missing behind ':'".to_owned());
        }
        let end = start + list.len();
        while self.next < self.tokens.len() && self.position(self.next) < end {
            self.next += 1;
        }
        self.cpus = Some((list.to_owned(), colon, end));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn is_type(name: &str) -> bool {
        matches!(name, "u64" | "atomic_t" | "page")
    }

    /// The tree with all its parentheses.
    fn show(expr: &Expr) -> String {
        match expr {
            Expr::Number(n) => n.value.to_string(),
            Expr::Name(name) => name.clone(),
            Expr::Register(name) => format!("${name}"),
            Expr::Unary(op, x) => {
                let (symbol, _) = PREFIXES.iter().find(|(_, one)| one == op).unwrap();
                format!("({symbol}{})", show(x))
            }
            Expr::Binary(op, x, y) => {
                let (symbol, _) = LEVELS.iter().flat_map(|l| l.iter()).find(|(_, one)| one == op).unwrap();
                format!("({}{symbol}{})", show(x), show(y))
            }
            Expr::Member(x, name) => format!("{}.{name}", show(x)),
            Expr::Index(x, y) => format!("{}[{}]", show(x), show(y)),
            Expr::Cast(ty, x) => format!("({{{ty}}}{})", show(x)),
            Expr::SizeOfType(ty) => format!("sizeof{{{ty}}}"),
            Expr::SizeOf(x) => format!("sizeof({})", show(x)),
        }
    }

    #[test]
    fn trees() {
        for (text, tree) in [
            ("1+2*3", "(1+(2*3))"),
            ("(1+2)*3", "((1+2)*3)"),
            ("a.b->c[2].d", "a.b.c[2].d"),
            ("*&x", "(*(&x))"),
            ("*p.q", "(*p.q)"),
            ("-1 - -2", "((-1)-(-2))"),
            ("1<<2+3", "(1<<(2+3))"),
            ("a&b==c", "(a&(b==c))"),
            ("a||b&&c", "(a||(b&&c))"),
            ("*p@3+1", "((*p)@(3+1))"),
            ("(struct page *)0x10", "({struct page*}16)"),
            ("((struct page *)0x10)->flags", "({struct page*}16).flags"),
            ("(unsigned long)x+1", "(({unsigned long}x)+1)"),
            ("(u64)x", "({u64}x)"),
            ("(x)", "x"),
            ("(x)+1", "(x+1)"),
            ("(char[16])x", "({char[16]}x)"),
            ("sizeof(struct page)*2", "(sizeof{struct page}*2)"),
            ("sizeof x.y", "sizeof(x.y)"),
            ("sizeof(x)", "sizeof(x)"),
            ("$rsp + 010", "($rsp+8)"),
            ("!~-+x", "(!(~(-(+x))))"),
        ] {
            assert_eq!(show(&parse(text, &is_type).unwrap().expr), tree, "{text}");
        }
    }

    #[test]
    fn cpus_and_labels() {
        for (text, cpus, label, tree) in [
            ("runqueues:2", Some("2"), "runqueues:7", "runqueues"),
            ("runqueues:2.nr_running", Some("2"), "runqueues:7.nr_running", "runqueues.nr_running"),
            ("rq:2,4-5 . x", Some("2,4-5"), "rq:7. x", "rq.x"),
            ("x:a->y", Some("a"), "x:7->y", "x.y"),
            ("x:3->y", Some("3"), "x:7->y", "x.y"),
            ("&x:all", Some("all"), "&x:7", "(&x)"),
            ("x.y + 1", None, "x:7.y + 1", "(x.y+1)"),
        ] {
            let parsed = parse(text, &is_type).unwrap();
            assert_eq!(parsed.cpus.as_deref(), cpus, "{text}");
            assert_eq!(parsed.label(7), label, "{text}");
            assert_eq!(show(&parsed.expr), tree, "{text}");
        }
    }

    #[test]
    fn constants_have_the_types_that_c_gives_them() {
        for (text, size, signed) in [
            ("1", 4, true),
            ("2147483647", 4, true),
            ("2147483648", 8, true),
            ("0x80000000", 4, false),
            ("0xffffffff", 4, false),
            ("4294967295", 8, true),
            ("0x100000000", 8, true),
            ("0xffffffff80000000", 8, false),
            ("1u", 4, false),
            ("1UL", 8, false),
            ("1ll", 8, true),
            ("18446744073709551615", 8, false),
        ] {
            let Expr::Number(n) = parse(text, &is_type).unwrap().expr else { unreachable!() };
            assert_eq!((n.size, n.signed), (size, signed), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        for (text, word) in [
            ("", "ends"),
            ("1+", "ends"),
            ("(1", "')'"),
            ("a[1", "']'"),
            ("a.", "member"),
            ("1 2", "'2'"),
            ("f(1)", "called"),
            ("a=1", "only reads"),
            ("a;b", "';b'"),
            ("09", "'09'"),
            ("0xg", "'0xg'"),
            ("12ab", "'12ab'"),
            ("ffff888000000000", "ends"),
            ("a:", "CPU"),
            ("a:1+b:2", "only one"),
            ("99999999999999999999", "not a number"),
        ] {
            match parse(text, &is_type) {
                Err(error) => assert!(error.contains(word), "{text}: {error}"),
                // All letters: a name, which the kernel does not have.
                Ok(parsed) => assert!(matches!(parsed.expr, Expr::Name(_)), "{text}"),
            }
        }
    }

    /// Whatever stands in a row is a tree or an error, and a tree has names.
    #[test]
    fn tokens_in_any_order_are_a_tree_or_an_error() {
        let pieces: Vec<&str> = SYMBOLS
            .into_iter()
            .chain([
                "x", "u64", "struct", "page", "sizeof", "$rip", "0x10", "7", "1ul", "08", "a", "é", "\"",
                " ", ";",
            ])
            .collect();
        // xorshift: the same on every run.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut trees = 0;
        for _ in 0..200_000 {
            let text: String = (0..random(12)).map(|_| pieces[random(pieces.len())]).collect();
            if let Ok(parsed) = parse(&text, &is_type) {
                trees += 1;
                assert!(!parsed.label(3).is_empty(), "{text}");
                parsed.any_name(&|name| !name.is_empty());
                // A type's name as a value is a cast once parentheses stand around it, in C too.
                if parsed.any_name(&is_type) {
                    continue;
                }
                // What is shown of a tree is the same tree again.
                let shown =
                    show(&parsed.expr).replace("({", "((").replace("sizeof{", "sizeof(").replace('}', ")");
                let again = parse(&shown, &is_type).unwrap_or_else(|e| panic!("{text}: {shown}: {e}"));
                assert_eq!(show(&again.expr), show(&parsed.expr), "{text}: {shown}");
            }
        }
        assert!(trees > 1000, "{trees}");
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let deep = "(".repeat(1000) + "1" + &")".repeat(1000);
        assert!(parse(&deep, &is_type).unwrap_err().contains("deeper"));
        assert!(parse(&"-".repeat(1000), &is_type).unwrap_err().contains("deeper"));
        assert!(parse(&("x".to_owned() + &"[1]".repeat(300)), &is_type).unwrap_err().contains("parts"));
        assert!(parse(&("1".to_owned() + &"+1".repeat(300)), &is_type).unwrap_err().contains("parts"));
        assert!(parse(&"1".repeat(5000), &is_type).unwrap_err().contains("longer"));
    }
}
