// SPDX-License-Identifier: Apache-2.0
//! Guest RAM: one sealed memfd, mapped once per range and given to KVM as one slot per range.
//!
//! Sealed against growing, shrinking and further seals before anybody else can hold the descriptor, so that no access
//! to it can ever fault because of its size. Nothing is touched at creation: pages come when the guest first uses
//! them.
//!
//! A clone's RAM is private memory instead, over which the parts of its image are mapped ([`crate::image`]); what can be
//! plugged later comes from a memfd as ever. Ranges are named by their place in the memory file, whether there is one or
//! not.

use cloister_boot::x86_64::layout::Layout;
use cloister_devices::GuestRam;
use rustix::fs::{MemfdFlags, SealFlags};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use crate::config::HugePages;
use crate::image::{self, Image, Noted, WorkingSet};
use crate::pagemap;

/// Bytes of one huge page on x86_64.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More than the host has.
    #[error(
        "{mib} MiB of guest memory asked for, the host has {host_mib} MiB; ask for less, or allow overcommit"
    )]
    MoreThanHost {
        /// Asked for, in MiB.
        mib: u64,
        /// RAM and swap of the host, in MiB.
        host_mib: u64,
    },
    /// Huge pages only come whole.
    #[error("{mib} MiB of guest memory is not a multiple of the 2 MiB huge pages asked for")]
    HugePageMultiple {
        /// Asked for, in MiB.
        mib: u64,
    },
    /// The memfd could not be made.
    #[error("cannot create a memory file of {mib} MiB")]
    Create {
        /// Asked for, in MiB.
        mib: u64,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A given memory file does not fit.
    #[error("the memory file given has {found} bytes, {expected} are needed")]
    WrongFile {
        /// Its size in bytes.
        found: u64,
        /// Needed, in bytes.
        expected: u64,
    },
    /// A clone copies pages one by one.
    #[error("a clone cannot have reserved huge pages: take transparent ones, or boot")]
    ReservedClone,
    /// It could not be mapped.
    #[error("cannot map {mib} MiB of guest memory{}", if *.huge { " with huge pages; reserve more of them in /proc/sys/vm/nr_hugepages" } else { "" })]
    Map {
        /// Asked for, in MiB.
        mib: u64,
        /// Whether reserved huge pages were asked for.
        huge: bool,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The RAM of one cell.
#[derive(Debug)]
pub struct Memory {
    ram: Arc<GuestRam>,
    /// Backs all of it; of a clone's only what can be plugged, if anything can.
    file: Option<Arc<File>>,
    ram_size: u64,
    /// Where the ranges lie: offset in the memory file, guest-physical address, bytes.
    ranges: Vec<(u64, u64, u64)>,
    /// What a clone was made from.
    image: Option<Arc<Image>>,
}

/// One range to become a KVM memory slot.
#[derive(Debug, Clone, Copy)]
pub struct SlotRange {
    /// Guest-physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Address in this process.
    pub host: u64,
}

/// What a layout asks for.
struct Plan {
    mib: u64,
    ranges: Vec<(u64, u64, u64)>,
    /// Of the file.
    size: u64,
}

impl Plan {
    fn new(layout: &Layout, overcommit: bool) -> Result<Self, Error> {
        // What can be plugged later is not there yet: it may be more than the host has.
        let mib = layout.ram_size() >> 20;
        let host_mib = host_memory_mib();
        if !overcommit && mib > host_mib {
            return Err(Error::MoreThanHost { mib, host_mib });
        }
        let ranges = in_file(layout);
        let size = ranges.last().map_or(0, |(offset, _, len)| offset + len);
        Ok(Self { mib, ranges, size })
    }
}

impl Memory {
    /// Makes RAM for `layout`, from `file` when one is given (the RAM of a saved cell).
    pub fn new(
        layout: &Layout,
        huge_pages: HugePages,
        overcommit: bool,
        file: Option<OwnedFd>,
        huge_mount: Option<BorrowedFd>,
    ) -> Result<Self, Error> {
        let Plan { mib, ranges, size } = Plan::new(layout, overcommit)?;
        if huge_pages == HugePages::Reserved && !size.is_multiple_of(HUGE_PAGE) {
            return Err(Error::HugePageMultiple { mib });
        }
        let file = match file {
            Some(file) => check_file(File::from(file), size, huge_pages)?,
            None => {
                create_file(size, huge_pages, huge_mount).map_err(|source| Error::Create { mib, source })?
            }
        };
        let file = Arc::new(file);
        let huge = huge_pages == HugePages::Reserved;
        let map_error = |source: Box<dyn std::error::Error + Send + Sync>| Error::Map { mib, huge, source };
        let mut regions = Vec::new();
        for &(offset, guest, len) in &ranges {
            let region = map(&file, offset, len, huge).map_err(|e| map_error(Box::new(e)))?;
            if huge_pages == HugePages::Transparent {
                advise_huge(&region);
            }
            let region = GuestRegionMmap::new(region, GuestAddress(guest))
                .ok_or_else(|| map_error("a range wraps around".into()))?;
            regions.push(region);
        }
        let ram = GuestMemoryMmap::from_regions(regions).map_err(|e| map_error(Box::new(e)))?;
        Ok(Self {
            ram: Arc::new(ram),
            file: Some(file),
            ram_size: layout.ram_size(),
            ranges,
            image: None,
        })
    }

    /// Makes RAM for `layout` that begins as what `image` holds. Transparent huge pages are only asked for where the image
    /// holds nothing: a page that is copied is a small one.
    pub(crate) fn of_image(
        layout: &Layout,
        huge_pages: HugePages,
        overcommit: bool,
        image: &Arc<Image>,
        huge_mount: Option<BorrowedFd>,
    ) -> Result<Self, Error> {
        let Plan { mib, ranges, size } = Plan::new(layout, overcommit)?;
        if image.ram_len() != size {
            return Err(Error::WrongFile {
                found: image.ram_len(),
                expected: size,
            });
        }
        if huge_pages == HugePages::Reserved {
            return Err(Error::ReservedClone);
        }
        let pluggable = layout.pluggable().map(|(base, _)| base);
        let file = match pluggable {
            None => None,
            Some(_) => {
                let file = create_file(size, huge_pages, huge_mount);
                Some(Arc::new(file.map_err(|source| Error::Create { mib, source })?))
            }
        };
        let map_error = |source: Box<dyn std::error::Error + Send + Sync>| Error::Map {
            mib,
            huge: false,
            source,
        };
        let mut regions = Vec::new();
        for &(offset, guest, len) in &ranges {
            let shared = file.as_ref().filter(|_| pluggable == Some(guest));
            let region = match shared {
                Some(file) => map(file, offset, len, false),
                None => map_fresh(len),
            };
            let region = region.map_err(|e| map_error(Box::new(e)))?;
            if huge_pages == HugePages::Transparent {
                advise_huge(&region);
            }
            // What is unplugged is punched out of a file: it has to be all of one.
            let filled = match shared {
                Some(_) => image::copy_into(image, &region, offset),
                None => image::map_over(image, &region, offset),
            };
            filled.map_err(|e| map_error(Box::new(e)))?;
            let region = GuestRegionMmap::new(region, GuestAddress(guest))
                .ok_or_else(|| map_error("a range wraps around".into()))?;
            regions.push(region);
        }
        let ram = GuestMemoryMmap::from_regions(regions).map_err(|e| map_error(Box::new(e)))?;
        let memory = Self {
            ram: Arc::new(ram),
            file,
            ram_size: layout.ram_size(),
            ranges,
            image: Some(Arc::clone(image)),
        };
        if let Some(set) = image.working_set() {
            // The disk works on all of it while the first pages are copied.
            image.read_ahead(&set.written);
            image.read_ahead(&set.read);
            memory.populate(&set.written);
        }
        Ok(memory)
    }

    /// Tells a clone's image what has been touched by now, if no other clone has come as far before.
    pub(crate) fn note_working_set(&self, noted: Noted) {
        if let Some(image) = &self.image
            && image.is_first(noted)
            && let Some(set) = self.working_set()
        {
            image.expect(set);
        }
    }

    /// What a clone has touched by now. None of what is no clone, or if the host does not say.
    pub(crate) fn working_set(&self) -> Option<WorkingSet> {
        let image = self.image.as_ref()?;
        let (mut written, mut read) = (Vec::new(), Vec::new());
        for region in self.private() {
            let offset = self.offset_of(region);
            let in_file = |range: Range<u64>| range.start + offset..range.end + offset;
            let is_read = |entry| pagemap::is_there(entry) && !pagemap::is_own(entry);
            written.extend(pagemap::ranges(region, pagemap::is_own)?.into_iter().map(in_file));
            read.extend(pagemap::ranges(region, is_read)?.into_iter().map(in_file));
        }
        Some(WorkingSet::new(image.identity(), written, read))
    }

    /// The RAM as devices and the boot loader see it.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The memory file: another mapping of the same RAM can be made from it. A clone has none.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        let whole = self.file.as_ref().filter(|_| self.image.is_none());
        whole.map(AsFd::as_fd)
    }

    /// Size of the memory file in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.ranges.last().map_or(0, |(offset, _, len)| offset + len)
    }

    /// Bytes that the guest starts with.
    pub fn ram_size(&self) -> u64 {
        self.ram_size
    }

    /// Bytes of the host's memory that it takes beyond what it shares with an image.
    pub fn resident(&self) -> Option<u64> {
        let in_file = match &self.file {
            Some(file) => in_blocks(file)?,
            None => 0,
        };
        let mut own = 0;
        for region in self.private() {
            own += pagemap::count(region, pagemap::is_own)?;
        }
        in_file.checked_add(own)
    }

    /// Bytes of the host's memory that it takes beyond what its guest starts with, and beyond `plugged` bytes.
    pub(crate) fn excess(&self, plugged: u64) -> Option<u64> {
        let given = if self.image.is_some() { 0 } else { self.ram_size };
        let resident = in_blocks(self.file.as_ref()?)?;
        Some(resident.saturating_sub(given.saturating_add(plugged)))
    }

    /// The parts of the memory file that have pages, as ranges in bytes. Empty if the file system cannot tell.
    pub fn touched(&self) -> Vec<Range<u64>> {
        use rustix::fs::{SeekFrom, seek};
        let Some(file) = &self.file else {
            return Vec::new();
        };
        let mut ranges = Vec::new();
        let mut at = 0;
        // Another offset of the same open file may be in use: all our own accesses name theirs.
        while let Ok(start) = seek(file, SeekFrom::Data(at)) {
            let Ok(end) = seek(file, SeekFrom::Hole(start)) else {
                break;
            };
            ranges.push(start..end);
            at = end;
        }
        ranges
    }

    /// The parts of RAM that may hold something else than zeroes, ascending, as ranges of the memory file.
    pub(crate) fn holding(&self) -> Vec<Range<u64>> {
        let mut ranges = self.touched();
        let Some(image) = &self.image else {
            return self.within(ranges);
        };
        ranges.extend(image.holding());
        for region in self.private() {
            let offset = self.offset_of(region);
            match pagemap::ranges(region, pagemap::is_there) {
                Some(present) => {
                    let in_file = |range: Range<u64>| range.start + offset..range.end + offset;
                    ranges.extend(present.into_iter().map(in_file));
                }
                // If the host does not say, all of it.
                None => ranges.push(offset..offset + region.len()),
            }
        }
        self.within(ranges)
    }

    /// The parts of RAM that may differ from what `base` holds, ascending, as ranges of the memory file: see the theory of
    /// operation of [`crate::image`].
    pub(crate) fn changed_since(&self, base: &Image) -> Vec<Range<u64>> {
        let made_of_it = self
            .image
            .as_ref()
            .filter(|image| image.identity() == base.identity());
        let written = made_of_it.and_then(|image| self.written(image));
        self.within(written.unwrap_or_else(|| {
            let mut ranges = self.holding();
            ranges.extend(base.holding());
            ranges
        }))
    }

    /// The parts of RAM that are not the image's pages any more. Unknown if the host does not say.
    fn written(&self, image: &Image) -> Option<Vec<Range<u64>>> {
        // What was copied from a newer image and then given back shows the older one's page.
        let mut ranges = image.changes();
        for region in self.ram.iter() {
            let offset = self.offset_of(region);
            if region.file_offset().is_some() {
                // A copy altogether.
                ranges.push(offset..offset + region.len());
                continue;
            }
            let own = pagemap::ranges(region, pagemap::is_own)?;
            ranges.extend(
                own.into_iter()
                    .map(|range| range.start + offset..range.end + offset),
            );
        }
        Some(ranges)
    }

    /// What of these ranges is RAM, ascending and without overlaps; none goes over from one range of RAM to the next.
    fn within(&self, ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        for range in merge(ranges) {
            for (start, _, len) in &self.ranges {
                let part = range.start.max(*start)..range.end.min(start + len);
                if part.start < part.end {
                    parts.push(part);
                }
            }
        }
        parts
    }

    /// Reads what is at `offset` of the memory file.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> std::io::Result<()> {
        let outside = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let (start, guest, _) = self
            .ranges
            .iter()
            .find(|(start, _, len)| (*start..start + len).contains(&offset))
            .ok_or_else(outside)?;
        self.ram
            .read_slice(data, GuestAddress(guest + (offset - start)))
            .map_err(std::io::Error::other)
    }

    /// The ranges of a clone's own.
    fn private(&self) -> impl Iterator<Item = &GuestRegionMmap<()>> {
        self.ram.iter().filter(|region| region.file_offset().is_none())
    }

    fn offset_of(&self, region: &GuestRegionMmap<()>) -> u64 {
        let start = region.start_addr().0;
        self.ranges
            .iter()
            .find(|(_, guest, _)| *guest == start)
            .map_or(0, |(offset, ..)| *offset)
    }

    /// Has the host make the pages of these parts of the memory file ready. What it cannot do now comes when touched.
    pub fn populate(&self, ranges: &[Range<u64>]) {
        for region in self.ram.iter() {
            let offset = self.offset_of(region);
            let in_file = offset..offset + region.len();
            for range in ranges {
                let start = range.start.max(in_file.start);
                let end = range.end.min(in_file.end);
                if start >= end {
                    continue;
                }
                let (skip, len) = (start - in_file.start, end - start);
                let Ok(slice) = region.get_slice(
                    MemoryRegionAddress(skip),
                    usize::try_from(len).unwrap_or(usize::MAX),
                ) else {
                    continue;
                };
                // SAFETY: the range lies in a mapping of ours, and the call changes no content.
                let result = unsafe {
                    libc::madvise(
                        slice.ptr_guard_mut().as_ptr().cast(),
                        slice.len(),
                        libc::MADV_POPULATE_WRITE,
                    )
                };
                if result != 0 {
                    let error = std::io::Error::last_os_error();
                    log::debug!("guest memory was not populated: {error}");
                    return;
                }
            }
        }
    }

    /// Gives the pages of this guest-physical range back to the host; the guest reads zeros there from now on. The
    /// bounds are those of whole pages.
    pub fn discard(&self, guest: u64, len: u64) -> std::io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        for region in self.ram.iter() {
            let start = region.start_addr().0;
            if (start..start + region.len()).contains(&guest) {
                let len = len.min(start + region.len() - guest);
                let Some(file) = self.file.as_ref().filter(|_| region.file_offset().is_some()) else {
                    return Err(std::io::ErrorKind::Unsupported.into());
                };
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                return Ok(fallocate(
                    file,
                    flags,
                    self.offset_of(region) + (guest - start),
                    len,
                )?);
            }
        }
        Err(std::io::ErrorKind::InvalidInput.into())
    }

    /// The ranges for KVM's memory slots.
    pub fn slots(&self) -> Vec<SlotRange> {
        self.ram
            .iter()
            .map(|region| SlotRange {
                guest: region.start_addr().0,
                size: region.len(),
                host: region.as_ptr().addr() as u64,
            })
            .collect()
    }
}

/// Where the ranges of memory lie in the file: offset, guest-physical address, bytes. What can be plugged begins with a
/// huge page, so that its blocks are whole ones.
fn in_file(layout: &Layout) -> Vec<(u64, u64, u64)> {
    let mut next = 0u64;
    let mut ranges = Vec::new();
    for (guest, len) in layout.memory() {
        let pluggable = layout.pluggable().is_some_and(|(base, _)| base == guest);
        let offset = if pluggable {
            next.next_multiple_of(HUGE_PAGE)
        } else {
            next
        };
        ranges.push((offset, guest, len));
        next = offset + len;
    }
    ranges
}

/// Bytes of the host's memory that a memory file takes.
fn in_blocks(file: &File) -> Option<u64> {
    /// What st_blocks counts, whatever the file's block size (stat(3type)).
    const BLOCK: u64 = 512;
    let stat = rustix::fs::fstat(file).ok()?;
    u64::try_from(stat.st_blocks).ok()?.checked_mul(BLOCK)
}

/// Sorted, and without overlaps.
pub(crate) fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// A tmpfs that is mounted nowhere and gives huge pages. Needs CAP_SYS_ADMIN.
pub(crate) fn huge_tmpfs() -> std::io::Result<OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "huge", "always")?;
    // No limit of its own: cells have theirs.
    fsconfig_set_string(context.as_fd(), "size", "0")?;
    fsconfig_create(context.as_fd())?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}

fn create_file(size: u64, huge_pages: HugePages, huge_mount: Option<BorrowedFd>) -> std::io::Result<File> {
    if huge_pages == HugePages::Transparent
        && let Some(mount) = huge_mount
    {
        use rustix::fs::{Mode, OFlags};
        // Nameless and never linked: nobody but holders of the descriptor can resize it, as if it were sealed.
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::EXCL;
        let file = File::from(rustix::fs::openat(mount, ".", flags, Mode::RUSR | Mode::WUSR)?);
        file.set_len(size)?;
        return Ok(file);
    }
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge_pages == HugePages::Reserved {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = File::from(rustix::fs::memfd_create("cloister-ram", flags)?);
    file.set_len(size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// A file that could shrink under us would kill the process with SIGBUS.
fn check_file(file: File, expected: u64, huge_pages: HugePages) -> Result<File, Error> {
    let found = file.metadata().map_or(0, |m| m.len());
    let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
    // A file of our own tmpfs cannot be sealed: what is known of it is that its seals are sealed.
    let own = huge_pages == HugePages::Transparent && seals == SealFlags::SEAL;
    let sealed = seals.contains(SealFlags::SHRINK) || own;
    if found != expected || !sealed {
        return Err(Error::WrongFile { found, expected });
    }
    Ok(file)
}

fn map(
    file: &Arc<File>,
    offset: u64,
    len: u64,
    huge: bool,
) -> Result<vm_memory::MmapRegion<()>, vm_memory::mmap::MmapRegionError> {
    // Reserved huge pages are counted at mmap, so that they cannot run out while the guest runs.
    let reserve = if huge { 0 } else { libc::MAP_NORESERVE };
    MmapRegionBuilder::new(usize::try_from(len).unwrap_or(usize::MAX))
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | reserve)
        .build()
}

/// Memory that is nobody else's, and zero.
fn map_fresh(len: u64) -> Result<vm_memory::MmapRegion<()>, vm_memory::mmap::MmapRegionError> {
    MmapRegionBuilder::new(usize::try_from(len).unwrap_or(usize::MAX))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
}

/// Asks for transparent huge pages. Only a wish: the host's shmem_enabled decides.
fn advise_huge(region: &vm_memory::MmapRegion<()>) {
    // SAFETY: the range is a whole mapping of ours, and the advice changes no content.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_HUGEPAGE) };
    if result != 0 {
        log::debug!(
            "no transparent huge pages for guest memory: {}",
            std::io::Error::last_os_error()
        );
    }
}

/// RAM and swap of the host in MiB.
fn host_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram.saturating_add(info.totalswap)).saturating_mul(u64::from(info.mem_unit)) >> 20
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_sealed_and_shared_by_both_ranges() {
        let layout = Layout::new(3400).unwrap();
        let memory = Memory::new(&layout, HugePages::No, true, None, None).unwrap();
        let seals = rustix::fs::fcntl_get_seals(memory.file().unwrap()).unwrap();
        assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
        let slots = memory.slots();
        assert_eq!(slots.len(), 2);
        assert_eq!(slots[1].guest, 1 << 32);
        memory.ram().write_obj(0x1234u32, GuestAddress(1 << 32)).unwrap();
        let again = Memory::new(
            &layout,
            HugePages::No,
            true,
            Some(memory.file().unwrap().try_clone_to_owned().unwrap()),
            None,
        )
        .unwrap();
        assert_eq!(
            again.ram().read_obj::<u32>(GuestAddress(1 << 32)).unwrap(),
            0x1234
        );
    }

    #[test]
    fn what_can_be_plugged_is_memory_from_the_start() {
        let mut layout = Layout::new(7).unwrap();
        layout.add_pluggable(1 << 40).unwrap();
        let (base, size) = layout.pluggable().unwrap();
        let memory = Memory::new(&layout, HugePages::No, false, None, None).unwrap();
        assert_eq!(memory.slots()[1].guest, base);
        let last = GuestAddress(base + size - 4);
        memory.ram().write_obj(7u32, last).unwrap();
        assert_eq!(memory.touched().last().unwrap().end, (8 << 20) + size);
        memory.discard(base + size - 4096, 4096).unwrap();
        assert_eq!(memory.ram().read_obj::<u32>(last).unwrap(), 0);
    }

    #[test]
    fn a_file_of_another_size_or_without_seals_is_refused() {
        let small = Memory::new(&Layout::new(1).unwrap(), HugePages::No, false, None, None).unwrap();
        let file = small.file().unwrap().try_clone_to_owned().unwrap();
        let error =
            Memory::new(&Layout::new(2).unwrap(), HugePages::No, false, Some(file), None).unwrap_err();
        assert!(
            matches!(
                error,
                Error::WrongFile {
                    found: 0x10_0000,
                    expected: 0x20_0000
                }
            ),
            "{error}"
        );
        let loose = File::from(rustix::fs::memfd_create("loose", MemfdFlags::CLOEXEC).unwrap());
        loose.set_len(1 << 20).unwrap();
        assert!(
            Memory::new(
                &Layout::new(1).unwrap(),
                HugePages::No,
                false,
                Some(loose.into()),
                None
            )
            .is_err()
        );
    }

    #[test]
    fn more_than_the_host_has_is_refused_unless_allowed() {
        let layout = Layout::new(1024 * 1024).unwrap();
        let error = Memory::new(&layout, HugePages::No, false, None, None).unwrap_err();
        assert!(matches!(error, Error::MoreThanHost { .. }), "{error}");
    }

    #[test]
    fn pages_are_found_made_ready_and_given_back() {
        let memory = Memory::new(&Layout::new(8).unwrap(), HugePages::No, false, None, None).unwrap();
        assert!(memory.touched().is_empty());
        memory.ram().write_obj(7u8, GuestAddress(0x10_2003)).unwrap();
        assert_eq!(
            memory.touched(),
            vec![Range {
                start: 0x10_2000,
                end: 0x10_3000
            }]
        );
        memory.populate(&[0x10_2000..0x10_3000, 0x20_0000..0x20_2000, 0x7f_f000..0x100_0000]);
        assert_eq!(
            memory.touched(),
            [0x10_2000..0x10_3000, 0x20_0000..0x20_2000, 0x7f_f000..0x80_0000]
        );
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x10_2003)).unwrap(), 7);
        memory.discard(0x10_2000, 0x1000).unwrap();
        assert_eq!(memory.touched(), [0x20_0000..0x20_2000, 0x7f_f000..0x80_0000]);
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x10_2003)).unwrap(), 0);
        assert!(memory.discard(0x800_0000, 0x1000).is_err());
    }

    #[test]
    fn huge_pages_come_whole() {
        let error =
            Memory::new(&Layout::new(3).unwrap(), HugePages::Reserved, false, None, None).unwrap_err();
        assert!(matches!(error, Error::HugePageMultiple { mib: 3 }), "{error}");
    }
}
