"""Six topics with a short text each, written for `privacy.py`, and how long answers on them run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topic:
    """`mean_tokens` is a guess at what assistants say on it."""

    mean_tokens: int
    text: str


TOPICS = {
    "small talk": Topic(
        45,
        "Oh, that is so nice to hear! I hope you had a good day at the lake. We can go on a "
        "walk if it is not too hot, or sit in the sun and have a cup of tea. Do you like it so "
        "far? It is fun to be out and see how the dog runs up to us and then off to the sea. I "
        "am glad you are ok. Let me know if you want to meet up on Sunday, or we do it next "
        "week. Yes, it was a bit cold but who cares, we had a lot of fun and so did the kids. "
        "See you soon! ",
    ),
    "medicine": Topic(
        140,
        "Persistent hypertension increases cardiovascular complications, particularly "
        "myocardial infarction and cerebrovascular haemorrhage. Antihypertensive "
        "pharmacotherapy typically combines angiotensin-converting enzyme inhibitors with "
        "thiazide diuretics. Contraindicated medications include nonsteroidal "
        "anti-inflammatory preparations. Recommend echocardiography and comprehensive "
        "metabolic laboratory investigations. Symptoms requiring immediate hospitalisation: "
        "breathlessness, unconsciousness, intermittent claudication, hypotension following "
        "administration of nitroglycerin. Consult your cardiologist before discontinuing. ",
    ),
    "code": Topic(
        170,
        "def merge(a, b):\n    i = j = 0\n    out = []\n    while i < len(a) and j < "
        "len(b):\n        if a[i] <= b[j]:\n            out.append(a[i])\n            i += "
        "1\n        else:\n            out.append(b[j])\n            j += 1\n    return out + "
        "a[i:] + b[j:]\n\nclass Node:\n    def __init__(self, key, left=None, "
        "right=None):\n        self.key = key\n        self.left = left\n        self.right = "
        "right\n\nfor x in range(10):\n    print(x, x ** 2, x % 3 == 0)\n",
    ),
    "money": Topic(
        110,
        "Your balance on 31/03 was 4,250.75 EUR; interest of 2.35% p.a. gives 99.89 EUR by "
        "31/12. A loan of 180,000 EUR over 25 years at 3.9% costs 940.20 EUR a month, 282,060 "
        "EUR in all. Fees: 1.5% (2,700 EUR) up front, 12 EUR per quarter. If you pay back "
        "5,000 EUR in 2027, the term falls to 24 years 1 month and you save 6,317.40 EUR. Tax: "
        "26.375% on gains above 1,000 EUR. The index fell 1.2% to 5,871 points; the bond "
        "yields 2.61% (-4 bp). ",
    ),
    "cooking": Topic(
        120,
        "First melt the butter in a heavy pan and brown the onions slowly until golden. Add "
        "garlic, carrots, celery, then stir in flour and cook for two minutes. Pour the warm "
        "stock over the vegetables, bring to a gentle simmer, cover and leave for half an "
        "hour. Meanwhile whisk eggs with cream, pepper and grated cheese. Season with salt, "
        "nutmeg and lemon juice, fold in chopped parsley and serve with crusty bread. Keeps in "
        "the fridge for three days; freeze any leftovers in small portions. ",
    ),
    "law": Topic(
        190,
        "Notwithstanding any provision to the contrary, the tenant shall indemnify the "
        "landlord against all claims arising hereunder, provided that such indemnification "
        "shall not extend to damages resulting from gross negligence. Pursuant to section 4 of "
        "this agreement, termination requires written notice of not less than three months. "
        "The parties hereby submit to the exclusive jurisdiction of the courts. Should any "
        "clause be held invalid or unenforceable, the remaining provisions shall continue in "
        "full force and effect. ",
    ),
}
