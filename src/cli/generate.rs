//! Shell completions and the manual page, both from the definitions that parse the command line.

use super::{Cli, Shell};
use clap::CommandFactory;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};
use std::io;

/// Arguments of every command, described once at the top of the page.
const COMMON: [&str; 3] = ["help", "version", "verbose"];

/// The script that makes `shell` complete kstub's commands and options.
pub fn completions(shell: Shell) -> Vec<u8> {
    let shell = match shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kstub", &mut script);
    script
}

/// The manual page, `kstub(1)`: one for all commands, so that searching it finds everything.
pub fn man() -> io::Result<Vec<u8>> {
    let mut cli = Cli::command().disable_help_subcommand(true);
    cli.build();
    let mut page = Vec::new();
    let top = Man::new(cli.clone()).source(format!("kstub {}", env!("CARGO_PKG_VERSION")));
    top.render_title(&mut page)?;
    top.render_name_section(&mut page)?;
    top.render_synopsis_section(&mut page)?;
    top.render_description_section(&mut page)?;
    top.render_options_section(&mut page)?;
    for command in cli.get_subcommands() {
        render_command(command.clone(), &mut page)?;
    }
    let text = cli.get_after_help().map(ToString::to_string).unwrap_or_default();
    render_blocks(&text, "SH", &mut page)?;
    Ok(without_repeated_preamble(&page))
}

/// Each piece of the page comes with the definitions of how to write an apostrophe; the first ones do.
fn without_repeated_preamble(page: &[u8]) -> Vec<u8> {
    const PREAMBLE: [&[u8]; 2] = [b".ie ", b".el "];
    let mut lines: Vec<&[u8]> = page.split_inclusive(|&b| b == b'\n').collect();
    let mut seen = 0;
    lines.retain(|line| {
        let preamble = PREAMBLE.iter().any(|start| line.starts_with(start));
        seen += usize::from(preamble);
        !preamble || seen <= PREAMBLE.len()
    });
    lines.concat()
}

/// One command as a section: what it does, how it is called, its options and examples.
fn render_command(mut command: clap::Command, page: &mut Vec<u8>) -> io::Result<()> {
    for id in COMMON {
        if command.get_arguments().any(|argument| argument.get_id() == id) {
            command = command.mut_arg(id, |argument| argument.hide(true));
        }
    }
    let title = command.get_bin_name().unwrap_or_else(|| command.get_name()).to_uppercase();
    let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let mut heading = Roff::default();
    heading.control("SH", [title.as_str()]);
    heading.to_writer(page)?;
    let man = Man::new(command);
    let mut body = Vec::new();
    man.render_description_section(&mut body)?;
    man.render_synopsis_section(&mut body)?;
    man.render_options_section(&mut body)?;
    // Sections of a page of its own become parts of this one; the first needs no title.
    let body =
        String::from_utf8_lossy(&body).replacen(".SH DESCRIPTION\n", "", 1).replace("\n.SH ", "\n.SS ");
    page.extend_from_slice(body.as_bytes());
    render_blocks(&examples, "SS", page)
}

/// Blocks of lines under a title that ends in a colon, as they stand in `--help`.
fn render_blocks(text: &str, heading: &str, page: &mut Vec<u8>) -> io::Result<()> {
    for block in text.split("\n\n").filter(|block| !block.is_empty()) {
        let (title, lines) = block.split_once('\n').unwrap_or((block, ""));
        let title = title.trim_end_matches(':').to_uppercase();
        let mut roff = Roff::default();
        roff.control(heading, [title.as_str()]).control("nf", []);
        for line in lines.lines() {
            // What it does stands behind some examples, as in a table.
            let indent = line.len() - line.trim_start().len();
            let end = line[indent..].find("  ").map_or(line.len(), |end| indent + end);
            let is_example = line[indent..].starts_with("kstub ");
            let (command, rest) = line.split_at(if is_example { end } else { 0 });
            roff.text([bold(command), roman(rest)]);
        }
        roff.control("fi", []);
        roff.to_writer(page)?;
    }
    Ok(())
}
