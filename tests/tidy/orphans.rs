//! No file that no `mod` declares: it would compile nowhere and its tests would never run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::tree;

/// Files from which the compiler starts: crate roots, integration tests, examples, build scripts.
fn roots() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in tree::rust_files() {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name in UTF-8");
        let folder = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        let grandparent = path.ancestors().nth(2).and_then(Path::file_name).and_then(|name| name.to_str());
        let crate_root = matches!(name, "lib.rs" | "main.rs") && folder == Some("src");
        let standalone = matches!(folder, Some("tests" | "examples" | "benches"));
        let folder_target =
            name == "main.rs" && matches!(grandparent, Some("tests" | "examples" | "benches"));
        if crate_root || standalone || folder_target || name == "build.rs" {
            found.push(path);
        }
    }
    found
}

/// Adds `path` and, recursively, every file that its `mod` items name.
fn reach(path: &Path, is_root: bool, reached: &mut BTreeSet<PathBuf>) {
    if !reached.insert(path.to_owned()) {
        return;
    }
    let folder = path.parent().expect("a file has a folder");
    let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name in UTF-8");
    let inside = if is_root || stem == "mod" { folder.to_owned() } else { folder.join(stem) };
    reach_items(&tree::parse(path).items, folder, &inside, reached);
}

fn reach_items(items: &[syn::Item], folder: &Path, inside: &Path, reached: &mut BTreeSet<PathBuf>) {
    for item in items {
        let syn::Item::Mod(module) = item else { continue };
        let name = module.ident.to_string();
        if let Some((_, items)) = &module.content {
            reach_items(items, folder, &inside.join(&name), reached);
            continue;
        }
        let by_path = module.attrs.iter().find_map(|attribute| match &attribute.meta {
            syn::Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
                syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(path), .. }) => {
                    Some(folder.join(path.value()))
                }
                _ => None,
            },
            _ => None,
        });
        let candidates = [inside.join(format!("{name}.rs")), inside.join(&name).join("mod.rs")];
        let found = by_path.into_iter().chain(candidates).find(|path| path.exists());
        let found = found.unwrap_or_else(|| panic!("mod {name} in {} has no file", inside.display()));
        let found = found.canonicalize().expect("an existing file");
        reach(&found, false, reached);
    }
}

#[test]
fn every_file_is_compiled() {
    let mut reached = BTreeSet::new();
    for path in roots() {
        reach(&path, true, &mut reached);
    }
    let orphans: Vec<_> = tree::rust_files().into_iter().filter(|path| !reached.contains(path)).collect();
    assert!(orphans.is_empty(), "files that no `mod` declares: {orphans:#?}");
}

#[test]
fn no_test_is_switched_off() {
    let switch = concat!("#[", "ignore");
    let off: Vec<_> = tree::rust_files()
        .into_iter()
        .filter(|path| std::fs::read_to_string(path).expect("a readable file").contains(switch))
        .collect();
    assert!(off.is_empty(), "tests that are ignored prove nothing: {off:#?}");
}
