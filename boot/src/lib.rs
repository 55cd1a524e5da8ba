// SPDX-License-Identifier: Apache-2.0
//! Puts a kernel into guest memory and makes a vCPU ready to enter it.
//!
//! Theory of operation: the caller owns guest memory, laid out as [`x86_64::layout::Layout`] says, and the vCPUs.
//! [`x86_64::load`] writes the kernel, the initial RAM disk, the command line and the tables by which the kernel
//! learns of memory, processors and devices, and answers an [`x86_64::entry::EntryPoint`]: plain register values
//! for the first vCPU. [`x86_64::cpuid`] and [`x86_64::msr`] compute what each vCPU must be given first. Nothing
//! here calls KVM, keeps state or starts threads: all of it can be tested without a virtual machine.
//!
//! Kernel and initial RAM disk come as open files and are read by position, so that many cells can load one
//! file at the same time. Both are distrusted: a truncated or hostile file gives an error, never a panic.

pub mod command_line;
pub mod file_at;
pub mod initrd;

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
