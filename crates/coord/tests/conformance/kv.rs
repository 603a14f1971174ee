//! Keys, revisions, transactions.

use std::rc::Rc;

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, GetResponse, PutOptions, SortOrder,
    SortTarget, Txn, TxnOp, TxnOpResponse,
};
use tonic::Code;

use crate::server::Server;

pub(crate) async fn puts_and_ranges(server: Rc<Server>) {
    let mut client = server.client().await;
    let first = put(&mut client, "range/a", "1").await;
    assert_eq!(put(&mut client, "range/b", "1").await, first + 1);
    assert_eq!(put(&mut client, "range/a", "2").await, first + 2);

    let answer = client.get("range/a", None).await.unwrap();
    let kv = &answer.kvs()[0];
    assert_eq!((kv.value(), kv.version(), kv.lease()), (&b"2"[..], 2, 0));
    assert_eq!((kv.create_revision(), kv.mod_revision()), (first, first + 2));
    assert_eq!(answer.header().unwrap().revision(), first + 2);

    let replaced = client.put("range/c", "3", Some(PutOptions::new().with_prev_key())).await.unwrap();
    assert!(replaced.prev_key().is_none());
    let replaced = client.put("range/c", "4", Some(PutOptions::new().with_prev_key())).await.unwrap();
    assert_eq!(replaced.prev_key().unwrap().value(), b"3");

    let all = GetOptions::new().with_prefix();
    for (key, options, keys, more, count) in [
        ("range/", all.clone(), &["range/a", "range/b", "range/c"][..], false, 3),
        ("range/", all.clone().with_limit(2), &["range/a", "range/b"], true, 3),
        ("range/", all.clone().with_count_only(), &[], false, 3),
        (
            "range/",
            all.clone().with_sort(SortTarget::Key, SortOrder::Descend),
            &["range/c", "range/b", "range/a"],
            false,
            3,
        ),
        (
            "range/",
            all.clone().with_sort(SortTarget::Mod, SortOrder::Ascend),
            &["range/b", "range/a", "range/c"],
            false,
            3,
        ),
        ("range/", all.clone().with_revision(first), &["range/a"], false, 1),
        ("range/a", GetOptions::new().with_range("range/c"), &["range/a", "range/b"], false, 2),
        ("range/c", GetOptions::new().with_range("range/a"), &[], false, 0),
        ("range/", GetOptions::new(), &[], false, 0),
    ] {
        let answer = client.get(key, Some(options.clone())).await.unwrap();
        assert_eq!(keys_of(&answer), keys, "{options:?}");
        assert_eq!((answer.more(), answer.count()), (more, count), "{options:?}");
    }
    let bare = client.get("range/", Some(all.with_keys_only())).await.unwrap();
    assert!(bare.kvs().iter().all(|kv| kv.value().is_empty()));
}

pub(crate) async fn deletes(server: Rc<Server>) {
    let mut client = server.client().await;
    for key in ["delete/a", "delete/b", "delete/c"] {
        put(&mut client, key, "v").await;
    }
    let before = put(&mut client, "delete/d", "v").await;
    let options = DeleteOptions::new().with_range("delete/c").with_prev_key();
    let answer = client.delete("delete/a", Some(options)).await.unwrap();
    assert_eq!((answer.deleted(), answer.prev_kvs().len()), (2, 2));
    assert_eq!(answer.header().unwrap().revision(), before + 1, "two keys, one revision");
    let answer = client.delete("delete/a", None).await.unwrap();
    assert_eq!(
        (answer.deleted(), answer.header().unwrap().revision()),
        (0, before + 1),
        "nothing is no revision"
    );

    put(&mut client, "delete/a", "again").await;
    let answer = client.get("delete/a", None).await.unwrap();
    let kv = &answer.kvs()[0];
    assert_eq!((kv.version(), kv.create_revision()), (1, before + 2), "it starts anew");
}

pub(crate) async fn transactions_compare(server: Rc<Server>) {
    let mut client = server.client().await;
    let created = put(&mut client, "cmp/a", "1").await;
    let modified = put(&mut client, "cmp/a", "2").await;
    put(&mut client, "cmp/b", "2").await;
    use CompareOp::{Equal, Greater, Less, NotEqual};
    for (compare, holds) in [
        (Compare::version("cmp/a", Equal, 2), true),
        (Compare::version("cmp/a", Greater, 2), false),
        (Compare::create_revision("cmp/a", Equal, created), true),
        (Compare::create_revision("cmp/a", Less, created), false),
        (Compare::mod_revision("cmp/a", Equal, modified), true),
        (Compare::mod_revision("cmp/a", NotEqual, modified), false),
        (Compare::value("cmp/a", Equal, "2"), true),
        (Compare::value("cmp/a", Greater, "1"), true),
        (Compare::lease("cmp/a", Equal, 0), true),
        (Compare::lease("cmp/a", Equal, 5), false),
        (Compare::create_revision("cmp/none", Equal, 0), true),
        (Compare::mod_revision("cmp/none", Greater, 0), false),
        (Compare::lease("cmp/none", Equal, 0), true),
        (Compare::value("cmp/none", NotEqual, "x"), false),
        (Compare::value("cmp/", Equal, "2").with_prefix(), true),
        (Compare::version("cmp/", Equal, 2).with_prefix(), false),
    ] {
        let txn = Txn::new()
            .when([compare.clone()])
            .and_then([TxnOp::get("cmp/a", None)])
            .or_else([TxnOp::get("cmp/b", None), TxnOp::get("cmp/b", None)]);
        let answer = client.txn(txn).await.unwrap();
        assert_eq!(answer.succeeded(), holds, "{compare:?}");
        assert_eq!(answer.op_responses().len(), if holds { 1 } else { 2 });
    }
}

pub(crate) async fn transactions_are_one_revision(server: Rc<Server>) {
    let mut client = server.client().await;
    let before = put(&mut client, "txn/old", "v").await;
    let txn = Txn::new().and_then([
        TxnOp::put("txn/a", "1", None),
        TxnOp::delete("txn/old", None),
        TxnOp::get("txn/", Some(GetOptions::new().with_prefix())),
        TxnOp::put("txn/b", "1", None),
    ]);
    let answer = client.txn(txn).await.unwrap();
    assert_eq!(answer.header().unwrap().revision(), before + 1);
    let ops = answer.op_responses();
    let TxnOpResponse::Get(get) = &ops[2] else { panic!("{ops:?}") };
    assert_eq!(keys_of(get), ["txn/a"], "it sees what went before, and not what comes after");
    let answer = client.get("txn/", Some(GetOptions::new().with_prefix())).await.unwrap();
    assert!(answer.kvs().iter().all(|kv| kv.mod_revision() == before + 1));

    let answer = client.txn(Txn::new().and_then([TxnOp::get("txn/a", None)])).await.unwrap();
    assert_eq!(answer.header().unwrap().revision(), before + 1, "reading is no revision");
}

pub(crate) async fn refusals(server: Rc<Server>) {
    let mut client = server.client().await;
    let revision = put(&mut client, "refuse/a", "v").await;
    let refused = client.put("", "v", None).await;
    refused_with(refused, Code::InvalidArgument, "etcdserver: key is not provided");
    let refused = client.put("refuse/a", "v", Some(PutOptions::new().with_lease(4_242))).await;
    refused_with(refused, Code::NotFound, "etcdserver: requested lease not found");
    let twice = [TxnOp::put("refuse/a", "1", None), TxnOp::put("refuse/a", "2", None)];
    let refused = client.txn(Txn::new().and_then(twice)).await;
    refused_with(refused, Code::InvalidArgument, "etcdserver: duplicate key given in txn request");
    let many: Vec<TxnOp> = (0..129).map(|key| TxnOp::get(format!("refuse/{key}"), None)).collect();
    let refused = client.txn(Txn::new().and_then(many)).await;
    refused_with(refused, Code::InvalidArgument, "etcdserver: too many operations in txn request");
    let refused = client.put("refuse/a", vec![0; 3 << 19], None).await;
    refused_with(refused, Code::InvalidArgument, "etcdserver: request is too large");

    let future = "etcdserver: mvcc: required revision is a future revision";
    refused_with(client.compact(revision + 1, None).await, Code::OutOfRange, future);
    let options = GetOptions::new().with_revision(revision + 1);
    refused_with(client.get("refuse/a", Some(options)).await, Code::OutOfRange, future);
    put(&mut client, "refuse/a", "w").await;
    client.compact(revision + 1, None).await.unwrap();
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    refused_with(client.compact(revision + 1, None).await, Code::OutOfRange, compacted);
    let options = GetOptions::new().with_revision(revision);
    refused_with(client.get("refuse/a", Some(options)).await, Code::OutOfRange, compacted);
}

fn refused_with<T: std::fmt::Debug>(answer: Result<T, Error>, code: Code, message: &str) {
    match answer {
        Err(Error::GRpcStatus(status)) => assert_eq!((status.code(), status.message()), (code, message)),
        other => panic!("expected {message:?}, not {other:?}"),
    }
}

/// Puts; the revision.
pub(crate) async fn put(client: &mut Client, key: &str, value: &str) -> i64 {
    client.put(key, value, None).await.unwrap().header().unwrap().revision()
}

fn keys_of(answer: &GetResponse) -> Vec<&str> {
    answer.kvs().iter().map(|kv| kv.key_str().unwrap()).collect()
}
