// SPDX-License-Identifier: Apache-2.0
//! Logs of containers.

use cloister_tests::cri::{Outcome, Runtime, ensure, eventually, script};
use serde_json::{Value, json};

/// Streams, long lines, lines without an end, and bytes that are no text.
pub async fn lines(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let container = pod.start(script(
        "echo one; sleep 0.2; echo two >&2; sleep 0.2; echo; head -c 40000 /dev/zero | tr '\\0' x; echo; printf '\\377\\n'; printf 'no end'",
    )).await?;
    container.ended().await?;
    // The last words may follow the end.
    eventually("the last line", async || {
        Ok(container.log()?.stdout.contains("no end").then_some(()))
    })
    .await?;
    let lines = container.log_lines()?;
    let times: Vec<&String> = lines.iter().map(|line| &line.time).collect();
    ensure(times.is_sorted(), format_args!("{times:?}"))?;
    container.remove().await?;
    let seen: Vec<Value> = lines
        .iter()
        .map(|line| {
            json!([
                line.stream,
                line.partial,
                if line.text.len() > 99 {
                    line.text.len().to_string()
                } else {
                    line.text.clone()
                }
            ])
        })
        .collect();
    Ok(json!(seen))
}

/// All that was said is there once the container has ended.
pub async fn complete(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let output = pod.output(script("seq 1 20000; seq 1 2000 >&2; exit 3")).await?;
    let numbers = |text: &str| {
        text.lines()
            .zip(1..)
            .all(|(line, number)| line == number.to_string())
    };
    ensure(
        numbers(&output.stdout) && numbers(&output.stderr),
        "lines are missing",
    )?;
    Ok(json!([
        output.stdout.lines().count(),
        output.stderr.lines().count(),
        output.code
    ]))
}

/// A log that is moved away is begun anew when asked.
pub async fn reopen(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let container = pod
        .start(script("i=0; while :; do i=$((i + 1)); echo $i; sleep 0.1; done"))
        .await?;
    container.says("3\n").await?;
    let moved = container.log_file().with_extension("1");
    std::fs::rename(container.log_file(), &moved)?;
    let request = cloister_tests::cri::api::ReopenContainerLogRequest {
        container_id: container.id.clone(),
    };
    runtime.cri().reopen_container_log(request).await?;
    eventually("the new log", async || {
        Ok((container.log_lines()?.len() > 3).then_some(()))
    })
    .await?;
    container.stop(0).await?;
    let count = |text: &str| -> Vec<u32> {
        text.lines()
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect()
    };
    let mut numbers = count(&std::fs::read_to_string(moved)?);
    numbers.extend(count(&std::fs::read_to_string(container.log_file())?));
    ensure(
        numbers.iter().zip(1..).all(|(&number, wanted)| number == wanted),
        format_args!("{numbers:?}"),
    )?;
    container.remove().await?;
    Ok(json!("nothing lost"))
}
