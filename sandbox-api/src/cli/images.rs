// SPDX-License-Identifier: Apache-2.0
//! `images`, `rmi`, `pull`, `load`.

use super::args::{ImagesArgs, LoadArgs, PullArgs};
use super::table::{decimal_size, printable, render};
use super::{Context, Failure, Outcome, containers, print, print_json};
use crate::clock;
use crate::image::{self, Image, Progress, PullOptions, Source, reference};
use std::io;
use std::path::PathBuf;

pub fn list(context: &Context, args: &ImagesArgs) -> Outcome {
    let images = context.store()?.images()?;
    if args.json {
        print_json(&images)?;
        return Ok(0);
    }
    let id = |image: &Image| {
        if args.no_trunc {
            image.id.to_string()
        } else {
            image.id.short().to_owned()
        }
    };
    if args.quiet {
        let ids: String = images.iter().map(|image| format!("{}\n", id(image))).collect();
        print(&ids)?;
        return Ok(0);
    }
    let now = clock::now();
    let mut rows = Vec::new();
    for image in &images {
        let created = image
            .created
            .as_deref()
            .and_then(|text| clock::parse_since(text, 0));
        let created = created.map_or_else(
            || "N/A".to_owned(),
            |time| format!("{} ago", clock::human(now - time)),
        );
        let names = if image.references.is_empty() {
            vec![("<none>".to_owned(), "<none>".to_owned())]
        } else {
            image
                .references
                .iter()
                .map(|name| reference::columns(name))
                .collect()
        };
        for (repository, tag) in names {
            rows.push(vec![
                printable(&repository),
                printable(&tag),
                id(image),
                created.clone(),
                decimal_size(image.size),
            ]);
        }
    }
    print(&render(
        &["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"],
        &rows,
    ))?;
    Ok(0)
}

pub fn remove(context: &Context, name: &str, force: bool) -> Outcome<()> {
    let pods = context.pods()?;
    let told = context
        .store()?
        .remove(name, force, &|image| containers::user_of(&pods, image))?;
    print(&told.iter().map(|line| format!("{line}\n")).collect::<String>())
}

pub fn pull(context: &Context, args: &PullArgs) -> Outcome {
    let store = context.store()?;
    let progress = Progress::for_stderr(args.quiet);
    let image = match Source::parse(&args.image)? {
        Source::Reference(name) => {
            let options = PullOptions {
                insecure: args.insecure,
                ..PullOptions::default()
            };
            image::pull(&store, &name, &options, &progress)?
        }
        Source::Directory(path) => {
            return Err(Failure::new(format!(
                "{} is a plain folder, there is nothing to pull",
                path.display()
            )));
        }
        source => image::import(&store, &source, &progress)?,
    };
    print(&format!("{}\n", name_of(&image)))?;
    Ok(0)
}

fn name_of(image: &Image) -> String {
    image
        .references
        .first()
        .cloned()
        .unwrap_or_else(|| image.id.to_string())
}

pub fn load(context: &Context, args: &LoadArgs) -> Outcome {
    let store = context.store()?;
    let source = match args.input.as_ref().or(args.source.as_ref()) {
        Some(text) if text != "-" => {
            // A bare file name is a file here, not an image's name.
            let bare = !text.contains(':') && !text.starts_with(['/', '.']);
            Source::parse(&if bare { format!("./{text}") } else { text.clone() })?
        }
        _ => {
            if rustix::termios::isatty(io::stdin()) {
                return Err(Failure::new(
                    "nothing to load: give an archive, or send one to stdin",
                ));
            }
            Source::Archive {
                file: PathBuf::from("/proc/self/fd/0"),
                tag: None,
            }
        }
    };
    for image in image::load(&store, &source, &Progress::for_stderr(args.quiet))? {
        let line = match image.references.first() {
            Some(name) => format!("Loaded image: {}\n", reference::familiar(name)),
            None => format!("Loaded image ID: {}\n", image.id),
        };
        print(&line)?;
    }
    Ok(0)
}
