#!/usr/bin/env python3
"""Makes the data, trains the demo model on it and writes demo/model/.

The model routes support tickets to a team. Its data is made here: sentences
from templates whose slots are filled at random, with openings, closings and
typing slips around them. A quarter of the templates of every team is held out
of training altogether, so the accuracy in the model card is on sentences whose
shape the model has never seen.

    pip install torch transformers tokenizers safetensors
    python3 demo/train.py            # about three minutes on two cores

Same seed, same data; the weights differ in the last digits between machines.
"""

import json
import pathlib
import random
import re

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "model"
SEED = 20261124
MAX_LEN = 128

SLOTS = {
    "month": "January February March April May June July August September October November December".split(),
    "amount": ["12", "19.99", "49", "89.50", "120", "240", "999", "7.95", "35"],
    "currency": ["euros", "dollars", "pounds", "EUR", "USD"],
    "order": ["#10234", "#88120", "#55671", "A-2291", "B-7740", "order 4471", "order 90012"],
    "item": ["headphones", "desk lamp", "coffee grinder", "jacket", "keyboard", "monitor", "backpack", "kettle",
             "running shoes", "phone case", "office chair", "water bottle"],
    "carrier": ["the courier", "the carrier", "DHL", "UPS", "the postal service", "your driver"],
    "days": ["two days", "three days", "a week", "ten days", "two weeks", "a month"],
    "app": ["the app", "your website", "the mobile app", "the dashboard", "the desktop client", "your API"],
    "device": ["my phone", "my laptop", "Windows", "my tablet", "Android", "the latest browser", "my iPhone"],
    "code": ["500", "403", "E-17", "timeout", "0x80", "502", "E-42"],
    "plan": ["the basic plan", "the team plan", "the premium plan", "my subscription", "the yearly plan"],
    "feature": ["dark mode", "a calendar view", "export to CSV", "keyboard shortcuts", "single sign-on",
                "offline use", "a French translation", "reminders"],
    "person": ["my colleague", "my wife", "our accountant", "my son", "a new employee", "my assistant"],
}

# team: sentences. The last quarter of each list is held out for the test.
TEMPLATES = {
    "billing": [
        "I was charged twice for {plan} in {month}.",
        "There is a payment of {amount} {currency} on my credit card that I do not recognise.",
        "Please send me the invoice for {month}.",
        "Why did my bill go up to {amount} {currency} this month?",
        "My card was declined when I tried to pay for {plan}.",
        "The invoice shows the wrong VAT number for our company.",
        "You took {amount} {currency} from my account after I cancelled {plan}.",
        "Can I pay by bank transfer instead of credit card?",
        "The discount code was not applied to my payment of {amount} {currency}.",
        "I need a receipt for the {amount} {currency} I paid in {month}.",
        "How do I update the credit card you charge for {plan}?",
        "The price on the invoice is not the price you advertised.",
        "My last two bills are wrong, you charged {amount} {currency} too much.",
        "We were billed for {plan} although the payment was already made in {month}.",
        "Our {month} invoice lists a charge of {amount} {currency} that nobody ordered.",
        "Could you correct the bill and charge my card only {amount} {currency}?",
        "Is there a receipt for the card payment in {month}?",
        "I see a double charge on my card for {plan}, what is this payment?",
    ],
    "shipping": [
        "Where is my package? {order} was due {days} ago.",
        "The tracking number for {order} has not moved for {days}.",
        "{carrier} left my parcel at the wrong address.",
        "My {item} has not arrived yet.",
        "Can you deliver {order} to another address?",
        "How long does delivery of the {item} take?",
        "{carrier} says the parcel was delivered but I never received it.",
        "Please tell me when {order} will be shipped.",
        "The package with the {item} seems to be lost in transit.",
        "I would like express shipping for {order}.",
        "Tracking says delivered, but there is no parcel at my door.",
        "Delivery was promised in {days} and the {item} is still not here.",
        "{carrier} could not find my address and returned the package.",
        "My delivery is late, {order} has been in transit for {days}.",
        "Has {order} been shipped, and is there a tracking number?",
        "The parcel has been stuck with {carrier} for {days}.",
        "When will the package with my {item} arrive?",
        "{carrier} never came to deliver the {item}, where is it now?",
    ],
    "technical": [
        "{app} crashes every time I open it on {device}.",
        "I get error {code} when I upload a file.",
        "{app} has been very slow for {days}.",
        "The page stays blank on {device} after the update.",
        "Error {code} appears when I click save.",
        "{app} does not load on {device}.",
        "Notifications stopped working on {device} since the last update.",
        "The search in {app} returns no results and shows error {code}.",
        "Video freezes in {app} after a few seconds.",
        "{app} is down, all I see is error {code}.",
        "Synchronising with {device} fails with error {code}.",
        "The latest update broke the upload on {device}.",
        "There is a bug in {app}, the save button does nothing.",
        "Since the update {app} freezes and crashes on {device}.",
        "Loading a file in {app} fails, the message is error {code}.",
        "The upload stopped working, {app} only shows a blank page.",
        "{app} shows error {code} on {device} and then crashes.",
        "A bug makes {app} slow to load on {device}.",
    ],
    "account": [
        "I forgot my password and the reset email never arrives.",
        "Please change the email address of my account.",
        "My account is locked after too many login attempts.",
        "How do I add {person} as a user to our account?",
        "I cannot log in although the password is correct.",
        "Please delete my account and all personal data.",
        "The two-factor code for login is not accepted.",
        "I want to change my username.",
        "Someone else logged in to my account from another country.",
        "{person} needs access to our account with a login of their own.",
        "The password reset link has expired.",
        "How can I merge two accounts with different email addresses?",
        "I no longer have the phone for my two-factor login.",
        "My login stopped being accepted and the password reset sends no email.",
        "Remove the user access of {person} from our account.",
        "Can you unlock my account? I typed the wrong password.",
        "I want to log in with another email address.",
        "Please give {person} a user login and a password.",
    ],
    "returns": [
        "The {item} arrived broken, I want to send it back.",
        "How do I return the {item} from {order}?",
        "I received the wrong size and would like to exchange the {item}.",
        "Please send me a return label for {order}.",
        "The {item} stopped working after {days}, is it under warranty?",
        "I want a refund for the {item}, it does not match the description.",
        "You sent me a {item} in the wrong colour, please exchange it.",
        "I returned {order} {days} ago and still wait for the refund.",
        "Can I return the {item} without the original box?",
        "The {item} is damaged, please send a replacement.",
        "I changed my mind and want to send the {item} back.",
        "What is the return address for {order}?",
        "Parts of the {item} were missing, I want a replacement or a refund.",
        "The {item} is faulty, how do I exchange it under warranty?",
        "Where is the refund for the {item} I sent back?",
        "Please exchange my {item}, it came damaged and in the wrong size.",
        "I need a label to return the broken {item}.",
        "The replacement {item} is damaged too, I want a refund.",
    ],
    "feedback": [
        "I love {app}, thank you for the great work!",
        "It would be great if {app} had {feature}.",
        "Just wanted to say that your support was excellent.",
        "Please add {feature}, many of us would love it.",
        "The new design of {app} is beautiful, well done.",
        "Suggestion: {feature} would make {app} even better.",
        "Thank you, {person} and I are very happy with it.",
        "Have you thought about adding {feature}?",
        "I find the new design confusing, the old one was better.",
        "Great product, I recommend it to everyone.",
        "My idea for the next version: {feature}.",
        "Your team was friendly and helpful, thanks a lot.",
        "I wish there was {feature} in {app}.",
        "Well done with the new version, we love it!",
        "Would you consider {feature}? It is a feature we would love.",
        "Thanks to your friendly team, excellent service!",
        "An idea: please add {feature} to {app}.",
        "I am happy with {app} and recommend it, great work.",
    ],
}

OPENINGS = ["", "", "", "Hi, ", "Hello, ", "Hello team, ", "Dear support, ", "Good morning, ", "Hey, ", "Urgent: ",
            "Quick question: ", "Hi there, "]
CLOSINGS = ["", "", "", " Thanks!", " Please help.", " Regards", " Can you look into this?", " Best regards, Sam",
            " Looking forward to your reply.", " Thank you in advance.", " This is urgent.", " Kind regards, Alex"]


def split(templates):
    held = len(templates) // 4
    return templates[:-held], templates[-held:]


def slip(rng, text):
    """One typing slip: two letters swapped, one dropped, or one doubled."""
    spots = [i for i in range(1, len(text) - 2) if text[i].isalpha() and text[i + 1].isalpha()]
    if not spots:
        return text
    i = rng.choice(spots)
    return rng.choice([
        text[:i] + text[i + 1] + text[i] + text[i + 2:],
        text[:i] + text[i + 1:],
        text[:i] + text[i] + text[i:],
    ])


def ticket(rng, templates):
    text = rng.choice(templates)
    text = re.sub(r"\{(\w+)\}", lambda m: rng.choice(SLOTS[m.group(1)]), text)
    text = text[0].upper() + text[1:]
    opening = rng.choice(OPENINGS)
    if opening and rng.random() < 0.5:
        text = text[0].lower() + text[1:]
    text = opening + text + rng.choice(CLOSINGS)
    if rng.random() < 0.3:
        text = slip(rng, text)
    if rng.random() < 0.15:
        text = text.lower()
    return text


def make(rng, part, n):
    labels = sorted(TEMPLATES)
    rows = []
    for _ in range(n):
        label = rng.choice(labels)
        rows.append((ticket(rng, split(TEMPLATES[label])[part]), labels.index(label)))
    return rows


def train_tokenizer(texts):
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=1600, special_tokens=special, show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tok.token_to_id("[CLS]")), ("[SEP]", tok.token_to_id("[SEP]"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, model_max_length=MAX_LEN, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]")


def batches(tokenizer, rows, size):
    for i in range(0, len(rows), size):
        part = rows[i:i + size]
        enc = tokenizer([t for t, _ in part], padding=True, truncation=True, max_length=MAX_LEN, return_tensors="pt")
        yield enc["input_ids"], enc["attention_mask"], torch.tensor([y for _, y in part])


def accuracy(model, tokenizer, rows):
    model.eval()
    right = 0
    with torch.no_grad():
        for ids, mask, y in batches(tokenizer, rows, 256):
            right += (model(input_ids=ids, attention_mask=mask).logits.argmax(-1) == y).sum().item()
    return right / len(rows)


def main():
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    train, test = make(rng, 0, 20000), make(rng, 1, 3000)
    tokenizer = train_tokenizer([t for t, _ in train])
    labels = sorted(TEMPLATES)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=MAX_LEN, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1,
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}, pad_token_id=0)
    model = BertForSequenceClassification(config)
    opt = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    epochs, size = 4, 64
    steps = epochs * (len(train) // size + 1)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=5e-4, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        rng.shuffle(train)
        model.train()
        total = 0.0
        for ids, mask, y in batches(tokenizer, train, size):
            # Words hidden at random: held-out sentences have other words around the telling ones.
            hide = (torch.rand(ids.shape) < 0.15) & (ids > 4)
            ids = ids.masked_fill(hide, tokenizer.mask_token_id)
            out = model(input_ids=ids, attention_mask=mask, labels=y)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            sched.step()
            opt.zero_grad()
            total += out.loss.item()
        print(f"epoch {epoch + 1}: loss {total * size / len(train):.4f}, held-out accuracy {accuracy(model, tokenizer, test):.4f}", flush=True)

    model = model.half().float()  # what is measured is what is shipped
    held_out = accuracy(model, tokenizer, test)
    OUT.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items() if "position_ids" not in k},
              OUT / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)
    for extra in ("special_tokens_map.json", "vocab.txt"):
        (OUT / extra).unlink(missing_ok=True)
    params = sum(p.numel() for p in model.parameters())
    (OUT / "README.md").write_text(CARD.format(
        params=params, train=len(train), test=len(test), accuracy=held_out * 100,
        held=sum(len(split(t)[1]) for t in TEMPLATES.values()), all=sum(len(t) for t in TEMPLATES.values()),
        labels=", ".join(labels)))
    examples = make(random.Random(SEED + 1), 1, 200)
    with open(HERE / "tickets.jsonl", "w") as f:
        for i, (text, _) in enumerate(examples):
            f.write(json.dumps({"id": f"T-{1000 + i}", "text": text}) + "\n")
    print(f"held-out accuracy {held_out:.4f}, {params} parameters")


CARD = """# kandle-demo

Routes a support ticket (English, one or two sentences) to one of: {labels}.

| | |
|---|---|
| architecture | BERT, 4 layers, 128 wide, 4 heads, {params} parameters, f16 safetensors |
| data | {train} made-up tickets for training, {test} for the test, by `demo/train.py` |
| held out | {held} of the {all} sentence templates are in the test alone |
| accuracy on the held-out templates | {accuracy:.1f} % |
| limit | 128 tokens |
| licence | as kandle |

It exists so that `kandle demo` and the tests have a real model to run. The tickets are made from templates; do not use
it for real ones.
"""

if __name__ == "__main__":
    main()
