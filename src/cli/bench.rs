use clap::Subcommand;
#[derive(Subcommand)]
pub enum Command { Pipeline }
pub fn bench(_: Command) -> anyhow::Result<()> { Ok(()) }
