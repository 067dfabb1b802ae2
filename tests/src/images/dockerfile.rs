//! As much of a Dockerfile's last stage as ours use. What is not understood is an error: an image of the tests that silently
//! differs from the one that users build would prove nothing.

use super::Config;
use anyhow::{Context, Result, bail};

/// The last stage of a Dockerfile.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Stage {
    /// Image after `FROM`.
    pub(super) base: String,
    /// Shell text of each `RUN`.
    pub(super) runs: Vec<String>,
    /// Source and destination of each `COPY --from`.
    pub(super) copies: Vec<(String, String)>,
    /// What the image says about how it is run.
    pub(super) config: Config,
}

pub(super) fn last_stage(text: &str) -> Result<Stage> {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect();
    let mut stage = Stage::default();
    for line in lines
        .join("\n")
        .replace("\\\n", " ")
        .lines()
        .filter(|line| !line.trim().is_empty())
    {
        let (instruction, rest) = line
            .trim()
            .split_once(' ')
            .with_context(|| line.to_string())?;
        let rest = rest.trim();
        match instruction {
            "FROM" => {
                let base = rest
                    .split_whitespace()
                    .next()
                    .context("FROM without an image")?;
                stage = Stage {
                    base: base.into(),
                    ..Stage::default()
                };
            }
            "RUN" => stage.runs.push(rest.into()),
            "COPY" => {
                let mut words = rest
                    .split_whitespace()
                    .filter(|word| !word.starts_with("--"));
                let (source, destination) = words
                    .next()
                    .zip(words.next())
                    .with_context(|| line.to_string())?;
                stage.copies.push((source.into(), destination.into()));
            }
            "USER" => stage.config.user = rest.into(),
            "ENV" => stage
                .config
                .env
                .extend(rest.split_whitespace().map(str::to_string)),
            "ENTRYPOINT" => {
                stage.config.entrypoint =
                    serde_json::from_str(rest).with_context(|| line.to_string())?;
            }
            "CMD" => {
                stage.config.cmd = serde_json::from_str(rest).with_context(|| line.to_string())?;
            }
            // Says nothing about how the container runs; WORKDIR is the build stage's.
            "LABEL" | "EXPOSE" | "ARG" | "WORKDIR" => {}
            _ => bail!("not understood: {line}"),
        }
    }
    Ok(stage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_stage_counts() {
        let text = "# comment\nFROM rust:1 AS build\nRUN cargo build\n\nFROM base:1\n# in between\nCOPY --from=build /a /bin/a\n\
                    RUN one \\\n && two\nENV A=1 B=2\nUSER 1:1\nENTRYPOINT [\"/bin/a\"]\nCMD [\"-v\"]\n";
        let expected = Stage {
            base: "base:1".into(),
            runs: vec!["one   && two".into()],
            copies: vec![("/a".into(), "/bin/a".into())],
            config: Config {
                entrypoint: vec!["/bin/a".into()],
                cmd: vec!["-v".into()],
                env: vec!["A=1".into(), "B=2".into()],
                user: "1:1".into(),
            },
        };
        assert_eq!(last_stage(text).unwrap(), expected);
        assert!(last_stage("FROM base:1\nADD x y\n").is_err());
    }
}
