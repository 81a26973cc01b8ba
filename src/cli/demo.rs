use clap::Args;
#[derive(Args)]
pub struct Options {}
pub fn demo(_: &Options) -> anyhow::Result<()> { Ok(()) }
