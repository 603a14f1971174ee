//! No file and no function too long to read in one sitting.

use std::path::Path;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::tree;

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

struct Functions<'a> {
    path: &'a Path,
    too_long: Vec<String>,
}

impl Functions<'_> {
    fn check(&mut self, name: &syn::Ident, whole: proc_macro2::Span) {
        let lines = whole.end().line - name.span().start().line + 1;
        if lines > FUNCTION_LINES_MAX {
            self.too_long.push(format!("{}: fn {name} has {lines} lines", self.path.display()));
        }
    }
}

impl<'ast> Visit<'ast> for Functions<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.check(&item.sig.ident, item.span());
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.check(&item.sig.ident, item.span());
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        self.check(&item.sig.ident, item.span());
        visit::visit_trait_item_fn(self, item);
    }
}

#[test]
fn files_are_short() {
    let long: Vec<String> = tree::rust_files()
        .iter()
        .filter_map(|path| {
            let lines = std::fs::read_to_string(path).expect("a readable file").lines().count();
            (lines > FILE_LINES_MAX).then(|| format!("{} has {lines} lines", path.display()))
        })
        .collect();
    assert!(
        long.is_empty(),
        "files over {FILE_LINES_MAX} lines; cut them where the subject changes: {long:#?}"
    );
}

#[test]
fn functions_are_short() {
    let mut too_long = Vec::new();
    for path in tree::rust_files() {
        let mut functions = Functions { path: &path, too_long: Vec::new() };
        functions.visit_file(&tree::parse(&path));
        too_long.append(&mut functions.too_long);
    }
    assert!(too_long.is_empty(), "functions over {FUNCTION_LINES_MAX} lines: {too_long:#?}");
}
