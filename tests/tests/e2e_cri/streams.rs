// SPDX-License-Identifier: Apache-2.0
//! Exec, attach and port-forward through containerd's streaming server.

use cloister_tests::cri::{Outcome, PortForward, Runtime, ensure, script};
use serde_json::{Value, json};

/// Pipes: each stream by itself, and the end of stdin.
pub async fn exec_pipes(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let both = shared
        .exec_stream(&["sh", "-c", "echo out; echo err >&2; exit 5"], false, false)
        .await?
        .end()
        .await?;
    let good = shared.exec_stream(&["true"], false, false).await?.end().await?;
    let text = "echo $$ >/tmp/pid; while read -r line; do echo \"<$line>\"; done; sleep 1000";
    let mut reader = shared.exec_stream(&["sh", "-c", text], true, false).await?;
    reader.send("one\n").await?;
    reader.until("<one>\n").await?;
    reader.send("two\n").await?;
    reader.until("<two>\n").await?;
    // Whoever hangs up leaves nothing running.
    drop(reader);
    let wait = "while kill -0 $(cat /tmp/pid) 2>/dev/null; do sleep 0.2; done; rm /tmp/pid; echo gone";
    let ended = shared.exec_script(wait).await?;
    let large = "0123456789abcdef".repeat(1 << 14);
    let mut sum = shared
        .exec_stream(&["sh", "-c", "head -c 262144 | sha256sum"], true, false)
        .await?;
    for piece in large.as_bytes().chunks(30_000) {
        sum.send(std::str::from_utf8(piece)?).await?;
    }
    let sum = sum.end().await?;
    Ok(json!({ "both": both, "good": good, "hung up": ended, "large": sum }))
}

/// A terminal: echo, sizes, control characters.
pub async fn exec_terminal(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let mut shell = shared
        .exec_stream(&["sh", "-c", "tty; echo ready; PS1= exec sh"], true, true)
        .await?;
    shell.until("ready\r\n").await?;
    shell.resize(123, 45).await?;
    // The size comes by another way than the input.
    shell
        .send("until [ \"$(stty size)\" = '45 123' ]; do sleep 0.1; done; echo si''zed\n")
        .await?;
    shell.until("sized\r\n").await?;
    shell
        .send("trap 'echo inter''rupted' INT; sleep 100; echo after\n")
        .await?;
    shell.until("echo after\r\n").await?;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    shell.send("\u{3}").await?;
    shell.until("interrupted\r\n").await?;
    shell.send("exit 6\n").await?;
    let end = shell.end().await?;
    ensure(end.stderr.is_empty(), format_args!("{end:?}"))?;
    // Prompts and echo are the shell's affair.
    let tty = end.stdout.lines().next().unwrap_or_default().to_owned();
    Ok(json!({ "tty": tty, "end": end.end, "echo": end.stdout.contains("echo si''zed") }))
}

/// Attached to the first process, more than once.
pub async fn attach(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config =
        script("while read -r line; do echo \"<$line>\"; echo \"[$line]\" >&2; done; echo end of input");
    config.stdin = true;
    let container = pod.start(config).await?;
    let mut first = container.attach().await?;
    first.send("one\n").await?;
    first.until("<one>\n").await?;
    let mut second = container.attach().await?;
    second.send("two\n").await?;
    second.until("<two>\n").await?;
    first.until("<two>\n").await?;
    // Its stdin stays open.
    drop(first);
    second.send("three\n").await?;
    second.until("<three>\n").await?;
    drop(second);
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    let alive = container.status().await?.state().as_str_name();
    container.stop(0).await?;
    let log = container.log()?;
    container.remove().await?;

    let mut config = container.config.clone();
    (config.metadata, config.stdin_once) = (None, true);
    config.log_path.clear();
    let once = pod.start(config).await?;
    let mut stream = once.attach().await?;
    stream.send("only\n").await?;
    stream.until("<only>\n").await?;
    drop(stream);
    let ended = once.ended().await?;
    let said = once.log()?;
    once.remove().await?;
    Ok(json!({ "alive": alive, "log": log, "once": said, "code": ended.exit_code }))
}

/// Attached to a terminal.
pub async fn attach_terminal(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = script(
        "stty -echo; echo ready; while read -r line; do echo \"<$line> $(stty size)\"; [ \"$line\" != quit ] || exit 8; done",
    );
    (config.stdin, config.tty) = (true, true);
    let container = pod.start(config).await?;
    container.says("ready").await?;
    let mut stream = container.attach().await?;
    stream.resize(77, 33).await?;
    stream.send("one\n").await?;
    stream.until("<one>").await?;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    stream.send("quit\n").await?;
    let said = stream.end().await?;
    let ended = container.ended().await?;
    container.remove().await?;
    Ok(json!({ "last": said.stdout.lines().last(), "code": ended.exit_code }))
}

/// A port of the pod, reached through the node.
pub async fn port_forward(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let server = pod.start(script(
        "socat TCP-LISTEN:8100,fork,reuseaddr EXEC:cat & socat TCP-LISTEN:8101,bind=127.0.0.1,fork,reuseaddr EXEC:'echo local' & \
         until [ $(ss -Hltn | wc -l) -ge 2 ]; do sleep 0.1; done; echo ready; wait",
    )).await?;
    server.says("ready").await?;
    let mut echo = PortForward::open(pod, 8100).await?;
    echo.send(b"hello").await?;
    let hello = echo.read(5).await?;
    let large = b"0123456789abcdef".repeat(1 << 13);
    // Each piece is read before the next is sent: who only writes to an echo waits for ever once all buffers are full.
    for piece in large.chunks(20_000) {
        echo.send(piece).await?;
        let (back, error) = echo.read(piece.len()).await?;
        ensure(
            back == piece,
            format_args!("{} bytes came back, {error:?}", back.len()),
        )?;
    }
    // Two at once.
    let (mut one, mut two) = (
        PortForward::open(pod, 8100).await?,
        PortForward::open(pod, 8101).await?,
    );
    one.send(b"more").await?;
    let (more, local) = (one.read(4).await?, two.read(usize::MAX).await?);
    let closed = PortForward::open(pod, 8102).await?.read(usize::MAX).await?;
    server.stop(0).await?;
    server.remove().await?;
    let text = |(data, error): (Vec<u8>, String)| json!([String::from_utf8_lossy(&data), error]);
    Ok(json!({
        "hello": text(hello), "more": text(more), "local": text(local),
        "closed": [closed.0.len().to_string(), closed.1.contains("refused").to_string()],
    }))
}
