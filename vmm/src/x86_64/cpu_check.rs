// SPDX-License-Identifier: Apache-2.0
//! Whether a cell that was saved on one processor can go on here: the same model, and nothing missing that its guest has
//! seen in CPUID.

use kvm_bindings::kvm_cpuid_entry2;

type Leaf = kvm_cpuid_entry2;
type Register = (&'static str, fn(&Leaf) -> u32);

const EAX: Register = ("EAX", |leaf| leaf.eax);
const EBX: Register = ("EBX", |leaf| leaf.ebx);
const ECX: Register = ("ECX", |leaf| leaf.ecx);
const EDX: Register = ("EDX", |leaf| leaf.edx);

/// Registers of which each bit is something that a processor has: function, index, registers.
const FEATURES: &[(u32, u32, &[Register])] = &[
    (1, 0, &[ECX, EDX]),
    (7, 0, &[EBX, ECX, EDX]),
    (7, 1, &[EAX, EBX, ECX, EDX]),
    (7, 2, &[EDX]),
    (0xd, 0, &[EAX, EDX]),
    (0xd, 1, &[EAX, ECX, EDX]),
    (0x4000_0001, 0, &[EAX]),
    (0x8000_0001, 0, &[ECX, EDX]),
    (0x8000_0007, 0, &[EDX]),
    (0x8000_0008, 0, &[EBX]),
    (0x8000_0021, 0, &[EAX]),
];

fn find(leaves: &[Leaf], function: u32, index: u32) -> Option<&Leaf> {
    leaves
        .iter()
        .find(|leaf| leaf.function == function && leaf.index == index)
}

/// The processor's name, as it gives it itself.
pub fn name(leaves: &[Leaf]) -> String {
    let mut bytes = Vec::new();
    for function in 0x8000_0002..=0x8000_0004 {
        if let Some(leaf) = find(leaves, function, 0) {
            for (_, register) in [EAX, EBX, ECX, EDX] {
                bytes.extend_from_slice(&register(leaf).to_le_bytes());
            }
        }
    }
    let text: String = bytes
        .iter()
        .filter(|byte| byte.is_ascii_graphic() || **byte == b' ')
        .map(|byte| char::from(*byte))
        .collect();
    match text.trim() {
        "" => "a processor without a name".to_owned(),
        name => name.to_owned(),
    }
}

/// Says what stands against a guest that knows `saved` going on where a new one would be given `own`.
pub fn check(saved: &[Leaf], own: &[Leaf]) -> Result<(), String> {
    let zero = Leaf::default();
    let leaf = |leaves: &[Leaf], function, index| find(leaves, function, index).copied().unwrap_or(zero);
    let vendor = |leaves: &[Leaf]| {
        let leaf = leaf(leaves, 0, 0);
        (leaf.ebx, leaf.ecx, leaf.edx)
    };
    if vendor(saved) != vendor(own) {
        return Err("the vendor is another".to_owned());
    }
    let (was, is) = (leaf(saved, 1, 0).eax, leaf(own, 1, 0).eax);
    if was != is {
        return Err(format!(
            "family, model and stepping are {was:#x} there and {is:#x} here"
        ));
    }
    for &(function, index, registers) in FEATURES {
        let (was, is) = (leaf(saved, function, index), leaf(own, function, index));
        for (register, value) in registers {
            let missing = value(&was) & !value(&is);
            if missing != 0 {
                return Err(format!(
                    "CPUID {function:#x}.{index} {register} bit {} is missing here",
                    missing.trailing_zeros()
                ));
            }
        }
    }
    // What KVM would not give a guest here, a file cannot give it either.
    for leaf in saved {
        if find(own, leaf.function, leaf.index).is_none() {
            return Err(format!(
                "CPUID {:#x}.{} is missing here",
                leaf.function, leaf.index
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ebx: u32) -> Leaf {
        Leaf {
            function,
            eax,
            ebx,
            ..Leaf::default()
        }
    }

    #[test]
    fn another_model_and_missing_features_are_named() {
        let own = [leaf(0, 0xd, 7), leaf(1, 0x800f12, 0), leaf(7, 0, 0b101)];
        assert_eq!(check(&own, &own), Ok(()));
        let less = [own[0], own[1], leaf(7, 0, 0b001)];
        assert_eq!(check(&less, &own), Ok(()));
        let text = check(&own, &less).unwrap_err();
        assert!(text.contains("0x7.0 EBX bit 2"), "{text}");
        let other = [own[0], leaf(1, 0x800f13, 0)];
        assert!(check(&other, &own).unwrap_err().contains("0x800f13"));
        assert!(check(&[leaf(0, 0xd, 8)], &own).unwrap_err().contains("vendor"));
        let more = [own[0], own[1], own[2], leaf(0x8000_0022, 1, 1)];
        assert!(check(&more, &own).unwrap_err().contains("0x80000022"));
    }

    #[test]
    fn a_processor_is_named_by_itself() {
        let text = b"Some Processor 9000\0";
        let mut leaves = Vec::new();
        for (function, chunk) in (0x8000_0002..).zip(text.chunks(16)) {
            let word = |at: usize| {
                let mut bytes = [0; 4];
                for (to, from) in bytes.iter_mut().zip(chunk.iter().skip(at)) {
                    *to = *from;
                }
                u32::from_le_bytes(bytes)
            };
            let (eax, ebx, ecx, edx) = (word(0), word(4), word(8), word(12));
            leaves.push(Leaf {
                function,
                eax,
                ebx,
                ecx,
                edx,
                ..Leaf::default()
            });
        }
        assert_eq!(name(&leaves), "Some Processor 9000");
        assert_eq!(name(&[]), "a processor without a name");
    }
}
