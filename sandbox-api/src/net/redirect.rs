// SPDX-License-Identifier: Apache-2.0
//! An interface of a pod's network namespace, joined to a tap.
//!
//! ```text
//!      ingress: redirect              ingress: redirect
//!  veth ───────────────▶ tap    and   tap ───────────────▶ veth
//! ```
//!
//! Both get an ingress queueing discipline with one filter that matches every frame and sends it out of the other
//! (mirred): before the namespace's own network stack sees it, and without a copy or a change, so that offloads (big
//! segments, checksums left to hardware) go through. The stack keeps its addresses, which CNI's CHECK and DEL look for.
//!
//! The tap is not persistent: it goes with its last descriptor, and its discipline with it. What then is left, on the other
//! interface, is found again by the cookie of its action.

use super::survey::{Found, all, name};
use super::{Error, tap};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32Option, TcHandle, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector, TcU32SelectorFlags,
};
use rtnetlink::{Handle, LinkUnspec};
use std::os::fd::OwnedFd;

/// How the taps are called, before the index of the interface they are joined to.
const TAP: &str = "cloister";
/// Marks our filters (TCA_ACT_COOKIE, up to 16 bytes).
const COOKIE: &[u8] = b"cloister";
/// The ingress discipline's handle, which is its filters' parent.
const INGRESS: u32 = 0xffff_0000;
const ETH_P_ALL: u16 = 0x0003;

fn failed<'a>(what: &'a str, interface: &'a str) -> impl FnOnce(rtnetlink::Error) -> Error + 'a {
    move |error| Error::Netlink(format!("{what} {interface}"), error)
}

/// The kernel's numbers of interfaces are positive ints.
fn tc_index(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(0)
}

/// Makes a tap of so many queues for an interface, and joins them. To be called in the namespace.
pub(super) async fn join(handle: &Handle, found: &Found, queues: usize) -> Result<Vec<OwnedFd>, Error> {
    let interface = &found.interface.name;
    let name = format!("{TAP}{}", found.index);
    let fds = tap::open_queues(&name, queues)?;
    let links = all(
        "find a tap",
        handle.link().get().match_name(name.clone()).execute(),
    );
    let index = links
        .await?
        .first()
        .map(|link| link.header.index)
        .ok_or_else(|| Error::Interface(name.clone(), "has gone".into()))?;
    // The namespace has nothing to say to the guest. Fails where there is no IPv6, which is as good.
    let silent = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])]);
    let silent = LinkUnspec::new_with_index(index).append_extra_attribute(silent);
    let _ = handle.link().set(silent.build()).execute().await;
    let up = LinkUnspec::new_with_index(index).mtu(found.mtu.into()).up();
    let up = handle.link().set(up.build()).execute().await;
    up.map_err(failed("set up", &name))?;
    for (index, name) in [(index, &name), (found.index, interface)] {
        let ingress = handle.qdisc().add(tc_index(index)).ingress().execute().await;
        ingress.map_err(failed("add an ingress queueing discipline to", name))?;
    }
    redirect(handle, index, found.index)
        .await
        .map_err(failed("redirect", &name))?;
    redirect(handle, found.index, index)
        .await
        .map_err(failed("redirect", interface))?;
    Ok(fds)
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    // One key without a mask: everything.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
        TcActionAttribute::Cookie(COOKIE.to_vec()),
    ];
    let options = [
        TcFilterU32Option::Selector(selector),
        TcFilterU32Option::Action(vec![action]),
    ];
    handle
        .traffic_filter(tc_index(from))
        .add()
        .parent(INGRESS)
        .protocol(ETH_P_ALL.to_be())
        .u32(&options)?
        .execute()
        .await
}

/// Takes apart whatever [`join`] has made in this namespace, whoever did it. To be called in the namespace.
pub(super) async fn part(handle: &Handle) -> Result<(), Error> {
    for link in all("list interfaces", handle.link().get().execute()).await? {
        let index = link.header.index;
        let name = name(&link);
        if is_our_tap(&link, &name) {
            // Its last descriptor may have been closed just now.
            if let Err(error) = handle.link().del(index).execute().await
                && !is(&error, libc::ENODEV)
            {
                return Err(failed("remove", &name)(error));
            }
        } else if has_our_filter(handle, index).await? {
            let mut ingress = handle.qdisc().del(tc_index(index));
            let message = ingress.message_mut();
            message.header.parent = TcHandle::INGRESS;
            message.header.handle = TcHandle::from(INGRESS);
            message.attributes.push(TcAttribute::Kind("ingress".to_owned()));
            ingress
                .execute()
                .await
                .map_err(failed("remove the ingress queueing discipline of", &name))?;
        }
    }
    Ok(())
}

fn is(error: &rtnetlink::Error, errno: i32) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -errno)
}

fn is_our_tap(link: &LinkMessage, name: &str) -> bool {
    let is_tun = link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.contains(&LinkInfo::Kind(InfoKind::Tun)))
    });
    is_tun && name.starts_with(TAP)
}

async fn has_our_filter(handle: &Handle, index: u32) -> Result<bool, Error> {
    let mut handle = handle.traffic_filter(tc_index(index));
    let filters = all("list filters", handle.get().ingress().execute()).await?;
    let is_ours = |action: &TcAction| {
        action
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, TcActionAttribute::Cookie(cookie) if cookie == COOKIE))
    };
    Ok(filters
        .iter()
        .flat_map(|filter| &filter.attributes)
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        })
        .flatten()
        .any(|option| {
            matches!(option, TcOption::U32(TcFilterU32Option::Action(actions)) if actions.iter().any(is_ours))
        }))
}
