# SPDX-License-Identifier: Apache-2.0
#
#   make run             set up, build, and show a container in its own VM
#   make test            set up, build, lint, run every test
#   make bench [ONLY=P] [ICOUNT=1] [PEER='NAME=PATH ...']
#                        the benchmarks whose names start with P; with ICOUNT=1 only those of instructions; with PEER against other
#                        VMMs and runtimes, too (tests/bench/README.md); results in target/bench/results.jsonl
#   make e2e [E2E=NAME]  only the end-to-end tests, or those whose names contain NAME (net::, cri::pods::life)
#   make plots           the figures of the last `make bench`, drawn: docs/figures
#   make deb             the Debian package, checked: target/deb/cloister_VERSION_amd64.deb
#   make cri             every case of CRI, on runc and on Cloister
#   make faults          everything that can be made to fail on a node
#   make again           what takes a thousand clones or a hundred restores to see
#   make setup, build, guest, lint, unit, guest-image-test, kvm-host-test, clean: the steps of the above
#
# Wherever Linux guests run, ci/with-kvm chooses between this machine's KVM and the emulated host, and says so.

export CLOISTER_CACHE ?= $(HOME)/.cache/cloister
# CI builds in a fresh clone each time: there, keep what was compiled from crates.io.
ifeq ($(CI),true)
export CARGO_TARGET_DIR ?= $(CLOISTER_CACHE)/target
else
export CARGO_TARGET_DIR ?= $(CURDIR)/target
endif
# Our programs first (inside the emulated host too), then cargo-nextest where ci/setup had to build it.
export PATH := $(abspath $(CARGO_TARGET_DIR))/release:$(PATH):$(CLOISTER_CACHE)/bin

agent_target := x86_64-unknown-linux-gnu
guest := $(CURDIR)/target/guest
# Where the tests and benchmarks find the guest kernel and its initramfs.
export CLOISTER_GUEST := $(guest)
# Room for 8 pods at once, and for a guest of 4 GiB.
kvm_options ?= --cpus 2 --memory 12288
# For hosts of one processor, in which the emulator was not seen to damage guests; `make e2e` runs as many at once as there are processors.
e2e_options ?= --memory 8192

.NOTPARALLEL:
.PHONY: setup build guest run test unit e2e cri faults again guest-image-test kvm-host-test bench plots lint deb clean

setup:
	ci/setup
ifeq ($(CI),true)
	ci/source-times $(CARGO_TARGET_DIR)
endif

# With the programs of the end-to-end tests in the same go: asked for by themselves they would have their libraries built
# again, with other features. Beside the guest's kernel, for cargo does not keep all processors busy all the time.
build: setup
	guest-image/build-kernel --out $(guest)/vmlinux & kernel=$$!; \
		{ guest-agent/build-static $(guest)/cloister-agent && ci/build-programs; } || { kill $$kernel; exit 1; }; \
		wait $$kernel
	@$(MAKE) --no-print-directory guest

# The agent with the C library inside it, for there is none in the guest; then what boots with it: our kernel, and
# Debian's own to test that it need not be ours.
guest: setup
	mkdir -p $(guest)
	guest-agent/build-static $(guest)/cloister-agent
	guest-image/build-kernel --out $(guest)/vmlinux
	guest-image/build-initramfs $(guest)/cloister-agent $(guest)/initramfs.cpio
	CLOISTER_DEBIAN_OUT=$(guest)/debian guest-image/build-debian-kernel $(guest)/cloister-agent

# prepare needs the network (Debian packages) and runs outside; there is none in the emulated host.
run: build
	tests/demo/prepare
	ci/with-kvm --cpus 1 $(e2e_options) -- tests/demo/run

test: build lint unit guest-image-test kvm-host-test e2e

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

# Unit tests, the hostile-guest kit and tiny guests, which any /dev/kvm can run. Not the e2e* programs: to link them takes long.
unit: setup
	cargo nextest run --config-file ci/nextest.toml --locked --workspace --lib --bins --test '[!e]*'

# The archive, the kernel's configuration, and boots of both kernels, which need no KVM.
guest-image-test: guest
	guest-image/test $(guest)/vmlinux

kvm-host-test: setup
	ci/test-kvm-host

e2e: build
	tests/demo/prepare
	ci/e2e --timeout 2400 $(e2e_options) -- $(E2E)

# All cases of CRI, each on runc and on Cloister's pods that boot and that are cloned.
cri: build
	tests/demo/prepare
	CLOISTER_CRI_ALL=1 ci/e2e --timeout 3600 --env CLOISTER_CRI_ALL $(kvm_options) -- cri::

# All that can be made to fail on a node, workers too; `make faults SOAK=500` for a long soak.
faults: build
	tests/demo/prepare
	CLOISTER_FAULTS_ALL=1 CLOISTER_SOAK=$(or $(SOAK),12) ci/e2e --timeout 7200 $(e2e_options) -- --include-ignored faults::

# A thousand clones that are killed, and a pod under load that is restored a hundred times.
again: build
	tests/demo/prepare
	CLOISTER_CYCLES=1000 CLOISTER_RESTORES=100 ci/e2e --timeout 7200 $(e2e_options) -- again_and_again

# The guest side of the benchmarks boots in place of the agent.
bench: build
	RUSTFLAGS='-C target-feature=+crt-static' \
		cargo build --locked --package cloister-guest-bench --profile agent --target $(agent_target)
	guest-image/build-initramfs $(CARGO_TARGET_DIR)/$(agent_target)/agent/cloister-guest-bench $(guest)/bench.cpio
	tests/demo/prepare
	ci/bench --only '$(ONLY)' $(foreach peer,$(PEER),--peer '$(peer)') $(if $(ICOUNT),--icount) $(kvm_options)

plots:
	$(CARGO_TARGET_DIR)/release/cloister-bench --out target/bench/results.jsonl --plot docs/figures

deb: build
	ci/check-deb "$$(ci/build-deb $(CARGO_TARGET_DIR)/release $(guest) target/deb)"

clean:
	cargo clean
	rm -rf target
