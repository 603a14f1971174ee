//! Text to tokens and back, over both faces.

use galerne_wire::v1::tokenize_request::Prompt;
use galerne_wire::v1::{Chat, ChatMessage, DetokenizeRequest, TokenizeRequest};
use serde_json::{Value, json};
use tonic::Code;

use crate::leader::Leader;
use crate::stage::{BARD, Stage, ids};

fn chat() -> Chat {
    let turn = ChatMessage { role: "user".to_owned(), content: "Speak".to_owned(), ..Default::default() };
    Chat { messages: vec![turn], ..Default::default() }
}

#[tokio::test]
async fn http_tokenizes_as_vllm_does() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let (text, speech) = (ids("ROMEO"), ids("user:\nSpeak\n\nassistant:\n"));
    let bos = vec![1];
    let messages = json!([{ "role": "user", "content": "Speak" }]);
    for (body, expected) in [
        (json!({ "prompt": "ROMEO" }), [bos.clone(), text.clone()].concat()),
        (json!({ "model": "bard", "prompt": "ROMEO", "add_special_tokens": false }), text.clone()),
        (json!({ "prompt": "", "add_special_tokens": false }), Vec::new()),
        (json!({ "messages": messages }), speech.clone()),
        (json!({ "messages": messages, "add_special_tokens": true }), [bos, speech.clone()].concat()),
        (json!({ "messages": messages, "add_generation_prompt": true, "tools": [] }), speech.clone()),
    ] {
        let reply = stage.post("/tokenize", &body).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let said =
            json!({ "count": expected.len(), "max_model_len": 2048, "tokens": expected, "token_strs": null });
        assert_eq!(reply.json(), said, "{body}");
    }
    let body = json!({ "prompt": "ROMEO", "return_token_strs": true, "add_special_tokens": false });
    let strings = stage.post("/tokenize", &body).await.json()["token_strs"].clone();
    let strings: Vec<_> = strings.as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!((strings.len(), strings.concat().as_str()), (text.len(), "ROMEO"));

    let reply = stage.post("/detokenize", &json!({ "model": "bard", "tokens": text })).await;
    assert_eq!((reply.status, reply.json()), (200, json!({ "prompt": "ROMEO" })));
}

#[tokio::test]
async fn http_refuses_by_name() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    for (path, body, status, param) in [
        ("/tokenize", json!({}), 400, json!("prompt")),
        ("/tokenize", json!({ "prompt": 7 }), 400, json!("prompt")),
        ("/tokenize", json!({ "messages": [] }), 400, json!("messages")),
        ("/tokenize", json!({ "prompt": "x", "messages": [] }), 400, json!("messages")),
        ("/tokenize", json!({ "prompt": "x", "model": "hamlet" }), 404, json!("model")),
        (
            "/tokenize",
            json!({ "messages": [{ "role": "user", "content": "x" }], "chat_template": "x" }),
            400,
            json!("chat_template"),
        ),
        ("/detokenize", json!({}), 400, json!("tokens")),
        ("/detokenize", json!({ "tokens": [-1] }), 400, json!("tokens")),
        ("/detokenize", json!({ "tokens": [1024] }), 400, json!("tokens")),
        ("/detokenize", json!([1]), 400, Value::Null),
    ] {
        let reply = stage.post(path, &body).await;
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (status, &param), "{body}: {reply:?}");
    }
}

#[tokio::test]
async fn grpc_tokenizes_the_same() {
    let leader = Leader::start(Vec::new()).await;
    let stage = Stage::with(&[&leader]).await;
    let mut client = stage.client().await;
    let text = || Some(Prompt::Text("ROMEO, ü".to_owned()));
    let (plain, speech) = (ids("ROMEO, ü"), ids("user:\nSpeak\n\nassistant:\n"));
    for (prompt, special, expected) in [
        (text(), None, [vec![1], plain.clone()].concat()),
        (text(), Some(false), plain.clone()),
        (Some(Prompt::Chat(chat())), None, speech.clone()),
        (Some(Prompt::Chat(chat())), Some(true), [vec![1], speech].concat()),
    ] {
        let request =
            TokenizeRequest { prompt, add_special_tokens: special, pieces: true, ..Default::default() };
        let said = client.tokenize(request).await.unwrap().into_inner();
        assert_eq!((said.count as usize, said.context_tokens_max), (expected.len(), 2048));
        assert_eq!(said.ids, expected);
        let bytes: Vec<_> = expected.iter().map(|&id| BARD.tokenizer.token_bytes(id).to_vec()).collect();
        assert_eq!(said.pieces.into_iter().map(|piece| piece.bytes).collect::<Vec<_>>(), bytes);
    }
    let ids = [vec![1], plain].concat();
    for (skip_special_tokens, expected) in [(true, "ROMEO, ü"), (false, "<s>ROMEO, ü")] {
        let request = DetokenizeRequest { ids: ids.clone(), skip_special_tokens, ..Default::default() };
        assert_eq!(client.detokenize(request).await.unwrap().into_inner().text, expected);
    }
    let mut unheard = chat();
    unheard.messages[0].role = "ghost".to_owned();
    let request = TokenizeRequest { prompt: Some(Prompt::Chat(unheard)), ..Default::default() };
    assert_eq!(client.tokenize(request).await.unwrap_err().code(), Code::InvalidArgument);
}
