//! Trees and lists with what was planted in them.

use super::*;

/// The planted entries of `kind`: key, and address as planted.
fn planted(told: &str, kind: &str) -> Vec<(String, u64)> {
    let lines = told.lines().filter_map(|line| line.strip_prefix(kind)?.strip_prefix('.')?.split_once('='));
    let entry = lines.filter(|(key, _)| key.split('-').all(|part| part.parse::<u64>().is_ok()));
    entry.map(|(key, value)| (key.to_owned(), hex(value))).collect()
}

fn place(told: &str, key: &str) -> VirtAddr {
    let line = told.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    VirtAddr(hex(line.unwrap_or_else(|| panic!("{key} is not planted"))))
}

fn sorted<K: Ord + Clone>(entries: &[(K, u64)]) -> Vec<(K, u64)> {
    let mut entries = entries.to_vec();
    entries.sort();
    entries
}

fn numbers(entries: &[(String, u64)]) -> Vec<(u64, u64)> {
    sorted(&entries.iter().map(|(key, at)| (key.parse().unwrap(), *at)).collect::<Vec<_>>())
}

fn check_xarray(kernel: &Kernel, root: VirtAddr, told: &[(u64, u64)], what: &str) {
    let walk = kernel.xarray(root);
    let found: Vec<(u64, u64)> = walk.entries.iter().map(|entry| (entry.index, entry.entry)).collect();
    assert_eq!((found.as_slice(), walk.problem), (told, None), "{what}");
    for &(index, entry) in told {
        assert_eq!(kernel.xarray_load(root, index), Ok(Some(entry)), "{what}: {index}");
    }
    let last = told.last().unwrap().0;
    for absent in (0..last + 3).filter(|index| told.iter().all(|(one, _)| one != index)).take(300) {
        assert_eq!(kernel.xarray_load(root, absent), Ok(None), "{what}: {absent}");
    }
    assert_eq!(kernel.xarray_load(root, last + 1_000_000), Ok(None), "{what}");
}

#[test]
fn trees_hold_what_was_planted() {
    let mut checked = 0;
    for_each_set(&mut |set, what, machine| {
        let Some(told) = fact(set, "planted/kstub_plant.txt") else { return };
        let kernel = machine.kernel().unwrap();
        // The tree of an IDR and a radix tree are xarrays.
        for (kind, root) in [("xarray", "xarray"), ("radix_tree", "radix_tree"), ("idr", "idr")] {
            let entries = numbers(&planted(&told, kind));
            assert!(entries.len() >= 5, "{what}: {kind}");
            check_xarray(kernel, place(&told, root), &entries, &format!("{what}: {kind}"));
        }
        // Nodes are in the entries somewhere: in the same place of each, and in the order of their keys.
        let entries = numbers(&planted(&told, "rbtree"));
        let walk = kernel.rb_tree(place(&told, "rbtree.root"));
        assert_eq!((walk.nodes.len(), &walk.problem), (entries.len(), &None), "{what}");
        let offsets: BTreeSet<u64> =
            walk.nodes.iter().zip(&entries).map(|(node, (_, entry))| node.0.wrapping_sub(*entry)).collect();
        assert!(offsets.len() == 1 && offsets.iter().all(|&offset| offset < 96), "{what}: {offsets:x?}");
        if kernel.types().unwrap().composite("maple_tree").is_some() && told.contains("maple_tree=") {
            let walk = kernel.maple_tree(place(&told, "maple_tree"));
            let found = walk.entries.iter().map(|one| (format!("{}-{}", one.first, one.last), one.entry));
            let found = sorted(&found.collect::<Vec<_>>());
            assert_eq!((found, walk.problem), (sorted(&planted(&told, "maple_tree")), None), "{what}");
        }
        checked += 1;
    });
    assert!(lab::sets().is_none() || checked > 0, "nothing was planted");
}
