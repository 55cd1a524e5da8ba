// SPDX-License-Identifier: Apache-2.0
//! `template`: VMs that have booted once, from which `run` clones.

use super::args::{TemplateArgs, TemplateBuildArgs};
use super::table::{binary_size, render};
use super::{Context, Failure, Outcome, client, each, print, print_json, run};
use crate::host_check;
use crate::pod::machine::{MachineConfig, Origin, Room};
use crate::pod::shelf::Shelf;
use crate::pod::template::{self, Kind};
use cloister_vmm::{CellHost, CellHostConfig, HugePages};
use std::time::Duration;

pub fn template(context: &Context, args: TemplateArgs) -> Outcome {
    match args {
        TemplateArgs::Build(args) => build(context, &args),
        TemplateArgs::Ls(args) => list(context, args.json),
        TemplateArgs::Rm(args) => each(&args.names, |name| {
            let shelf = Shelf::of(&context.state);
            let failed = |error| Failure::new(format!("cannot remove template {name}: {error}"));
            shelf.remove(name).map_err(failed)?;
            print(&format!("{name}\n"))
        }),
    }
}

fn build(context: &Context, args: &TemplateBuildArgs) -> Outcome {
    host_check::can_run().map_err(Failure::new)?;
    let kernel = run::kernel(args.kernel.as_ref())?;
    let initrd = run::initrd(args.initrd.as_ref())?;
    let config = MachineConfig {
        name: "template".to_owned(),
        cpus: args.cpus,
        memory: args.memory,
        huge_pages: HugePages::default(),
        dax: args.dax,
        kernel: &kernel,
        initrd: &initrd,
        kernel_args: &args.kernel_arg,
        nics: Vec::new(),
        room: Room::default(),
        origin: Origin::Boot,
    };
    let cards = usize::from(args.net != crate::pod::state::Network::None);
    let kind = Kind::of(&config, template::NODE)
        .ok_or_else(|| Failure::new("virtual machines with this kernel or these pages cannot be cloned"))?
        .with_cards(vec![1; cards]);
    let cells =
        CellHost::new(CellHostConfig::default()).map_err(|e| Failure::new(crate::error::chain(&e)))?;
    let patience = Duration::from_secs(args.init_timeout);
    let image = client::runtime()?
        .block_on(template::build(&kind, &cells, patience))
        .map_err(|e| Failure::new(crate::error::chain(&e)))?;
    let name = Shelf::of(&context.state).put(&kind, &image)?;
    print(&format!("{name}\n"))?;
    Ok(0)
}

fn list(context: &Context, json: bool) -> Outcome {
    let all = Shelf::of(&context.state).all()?;
    if json {
        let rows: Vec<_> = all
            .iter()
            .map(|shelved| match &shelved.image {
                Ok(image) => serde_json::json!({
                    "name": shelved.name,
                    "memory_mib": image.shape().memory_mib,
                    "vcpus": image.shape().max_vcpus,
                    "ram_bytes": image.ram_bytes(),
                    "processor": image.processor(),
                }),
                Err(error) => serde_json::json!({"name": shelved.name, "error": crate::error::chain(error)}),
            })
            .collect();
        print_json(&rows)?;
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|shelved| {
            let words = match &shelved.image {
                Ok(image) => [
                    image.shape().max_vcpus.to_string(),
                    format!("{}MiB", image.shape().memory_mib),
                    binary_size(image.ram_bytes()),
                    image.processor(),
                ],
                Err(error) => ["-".into(), "-".into(), "-".into(), crate::error::chain(error)],
            };
            std::iter::once(shelved.name.clone()).chain(words).collect()
        })
        .collect();
    print(&render(&["NAME", "CPUS", "MEMORY", "SIZE", "PROCESSOR"], &rows))?;
    Ok(0)
}
