# ruff: noqa: E501
"""The prompts on which a head for SmolLM2 is trained: ours, generated from lists, so that the recipe can be run again.

python examples/mtp_prompts.py OUT.jsonl [--seed 0] [--count 6000] [--also FILE.jsonl ...] [--articles DATA.jsonl | --asked] [--model MODEL]

One JSON object a line, ``{"messages": [...], "category": ...}``: questions, writing, reasoning, arithmetic, code, translation, lists,
role play, and tasks on a passage. The passages are ours too. `--also` adds the questions of other files (`question` or `prompt`).

`--articles` makes other prompts instead: half of them have long texts to be summarised or searched for an answer, which are what MODEL
itself wrote (a `--data` file of ``specfx train mtp``); half are short questions of fact, and German to be translated.

`--asked` makes other prompts instead: those that MODEL itself writes where a user's turn begins, drawn at temperature 0.9 (Magpie, Xu et al.
2024). They range over all that the model was taught, which no list of ours does.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

TOPICS = """the water cycle|photosynthesis|the French Revolution|plate tectonics|black holes|the human heart|antibiotics|supply and demand|inflation
the Roman Empire|the printing press|machine learning|vaccines|renewable energy|electric cars|the stock market|volcanoes|coral reefs|the immune system
DNA|evolution|the solar system|the moon landing|climate change|the industrial revolution|democracy|the Cold War|ancient Egypt|the Silk Road|Shakespeare
impressionism|jazz music|classical music|the internet|cybersecurity|cloud computing|quantum computing|nuclear energy|gravity|magnetism|light|sound
the periodic table|chemical bonds|acids and bases|cells|bacteria and viruses|the brain|sleep|nutrition|exercise|stress|meditation|mental health
habit formation|time management|public speaking|teamwork|leadership|negotiation|personal finance|credit scores|taxes|insurance|starting a business
marketing|customer service|remote work|job interviews|resumes|learning a language|studying for exams|reading books|writing essays|poetry|the novel
film making|photography|painting|architecture|gardening|cooking|baking bread|coffee|tea|chocolate|cheese|Italian cuisine|Japanese cuisine|Mexican food
travel|Paris|Tokyo|New York|London|Rome|Cairo|Sydney|Rio de Janeiro|the Amazon rainforest|the Sahara desert|the Arctic|the Himalayas|the oceans
sharks|whales|dogs|cats|horses|birds|bees|butterflies|ants|spiders|dinosaurs|elephants|penguins|football|basketball|tennis|chess|swimming|running
yoga|cycling|the Olympic Games|robots|drones|3D printing|virtual reality|social media|smartphones|video games|email|spreadsheets|databases|Python
JavaScript|operating systems|algorithms|data structures|statistics|probability|calculus|linear algebra|geometry|logic|ethics|philosophy|stoicism
Buddhism|mythology|folk tales|dreams|friendship|family|happiness|courage|honesty|education|homework|school uniforms|healthcare|transportation|housing
recycling|plastic pollution|water conservation|deforestation|endangered species|earthquakes|hurricanes|the weather|seasons|the tides|stars|galaxies
telescopes|satellites|rockets|airplanes|trains|bridges|skyscrapers|clocks|maps|money|trade|farming|fishing|mining|steel|glass|paper|textiles|fashion
toys|holidays|birthdays|weddings|museums|libraries|zoos|parks|beaches|mountains|rivers|lakes|forests|deserts|islands|caves""".replace(
    "\n", "|"
).split("|")
NAMES = """Anna|Ben|Carla|David|Elena|Farid|Grace|Hiro|Isabel|Jack|Kofi|Lena|Mateo|Nina|Omar|Priya|Quinn|Rosa|Sam|Tara|Umar|Vera|Will|Xia|Yusuf
Zoe|Liam|Mia|Noah|Sofia""".replace("\n", "|").split("|")
THINGS = """apples|books|pencils|marbles|cookies|stamps|cards|oranges|bottles|tickets|chairs|flowers|eggs|candles|coins|shirts|boxes|balloons|cups
stickers|bricks|fish|toys|sandwiches|notebooks""".replace("\n", "|").split("|")
PLACES = [
    "a bakery",
    "a farm",
    "a school",
    "a library",
    "a factory",
    "a supermarket",
    "a zoo",
    "a garden",
    "a hotel",
    "a theater",
    "a bookshop",
    "a post office",
]
ROLES = """a pirate|a doctor|a detective|a medieval knight|a chef|a travel guide|a robot|a history teacher|a lawyer|a sports coach|a poet|a scientist
a time traveler|a news reporter|a grandmother|a philosopher|an astronaut|a gardener|a king|a wizard""".replace("\n", "|").split("|")
LANGUAGES = ["German", "French", "Spanish", "Italian", "English"]
CODE = """returns the sum of the even numbers in a list|checks whether a string is a palindrome|computes the n-th Fibonacci number
counts the vowels in a string|reverses a linked list|finds the largest element of a list|sorts a list with bubble sort|merges two sorted lists
computes the factorial of a number|checks whether a number is prime|removes duplicates from a list|finds the common elements of two lists
counts how often each word occurs in a text|converts Celsius to Fahrenheit|flattens a nested list|computes the greatest common divisor
rotates a list by k places|finds the second largest number|checks whether two strings are anagrams|does a binary search|validates an email address
reads a CSV file and prints its rows|capitalizes each word of a sentence|computes the mean and the median of a list|transposes a matrix
multiplies two matrices|generates all permutations of a string|finds the longest word in a sentence|converts a number to binary
sums the digits of a number|computes compound interest|draws a multiplication table|parses a date|groups words by their first letter
implements a stack|implements a queue|counts the inversions of a list|computes the power of a number|finds all divisors of a number""".replace(
    "\n", "|"
).split("|")
WORDS = [
    "river",
    "lamp",
    "winter",
    "bread",
    "window",
    "music",
    "garden",
    "letter",
    "silver",
    "storm",
    "bridge",
    "secret",
    "journey",
    "shadow",
    "forest",
    "clock",
    "market",
    "island",
    "mirror",
    "door",
]
SENTENCES = """The weather is very nice today, so we are going to the park.|I would like to book a table for two people at eight o'clock.
My brother works in a hospital and he likes his job.|Could you please tell me where the train station is?|We have lived in this city for ten years.
The book that you gave me was very interesting.|She will travel to Spain next summer with her friends.|Please close the window because it is cold.
The children are playing in the garden behind the house.|I forgot my keys at the office yesterday.|The museum opens at nine and closes at five.
He learned to cook when he was a student.|There is a small restaurant near the bridge.|The meeting was moved to Thursday morning.
If it rains tomorrow, we will stay at home.|They bought a new car last week.|The teacher explained the problem again.
Many people visit the old town every year.|I have been learning this language for six months.|The doctor told him to drink more water.""".replace(
    "\n", "|"
).split("|")


def passage(pick: random.Random) -> str:
    """A few sentences of facts that nobody else has written."""
    name, other = pick.sample(NAMES, 2)
    place = pick.choice(PLACES)
    topic = pick.choice(TOPICS)
    year = pick.randrange(1890, 2021)
    thing = pick.choice(THINGS)
    lines = [
        f"{name} has run {place} on {pick.choice(WORDS).capitalize()} Street since {year}, together with {other}.",
        f"They started with {pick.randrange(2, 9)} rooms and {pick.randrange(100, 900)} dollars, and sold mostly {thing}.",
        f"In {year + pick.randrange(2, 15)} a {pick.choice(['fire', 'flood', 'storm', 'strike'])} closed it for {pick.randrange(2, 12)} weeks.",
        f"{other} used the time to study {topic}, which later became the theme of a yearly festival with {pick.randrange(2, 60)} hundred visitors.",
        f"Today the business has {pick.randrange(3, 80)} employees and opens at {pick.randrange(6, 11)} in the morning.",
        f"{name} says that the hardest part is {pick.choice(['finding good people', 'the rising rent', 'the long days', 'the paperwork'])}, "
        f"and that the best part is {pick.choice(['the regular guests', 'the quiet mornings', 'working with friends', 'the festival'])}.",
        f"Last {pick.choice(['spring', 'summer', 'autumn', 'winter'])} they opened a second shop, {pick.randrange(2, 40)} kilometers away.",
    ]
    return " ".join(lines[: pick.randrange(4, len(lines) + 1)])


def question(pick: random.Random) -> str:
    topic, other = pick.sample(TOPICS, 2)
    return pick.choice(
        [
            f"What is {topic}?",
            f"Explain {topic} in simple terms.",
            f"How does {topic} affect everyday life?",
            f"What are the most important facts about {topic}?",
            f"Compare {topic} and {other}.",
            f"Who should care about {topic}, and why?",
            f"What is the history of {topic}?",
            f"What are common misconceptions about {topic}?",
            f"Describe the advantages and disadvantages of {topic}.",
            f"Why is {topic} important?",
            f"How would you explain {topic} to a ten-year-old child?",
            f"Discuss the relationship between {topic} and {other}, with examples.",
            f"What would happen if {topic} did not exist?",
        ]
    )


def writing(pick: random.Random) -> str:
    topic, name, word = pick.choice(TOPICS), pick.choice(NAMES), pick.choice(WORDS)
    return pick.choice(
        [
            f"Write a short story about {name} and a {word}.",
            f"Write a poem about {topic}.",
            f"Compose an email to {name} to postpone a meeting about {topic}.",
            f"Write a blog post about {topic} with a catchy title.",
            f"Write the introduction of an essay on {topic}.",
            f"Describe a {word} in vivid detail.",
            f"Write a product description for a {word} inspired by {topic}.",
            f"Write a persuasive letter about {topic} to the mayor.",
            f"Draft a speech for {name}'s birthday.",
            f"Write a dialogue between {name} and {pick.choice(NAMES)} about {topic}.",
            f"Write a review of a documentary about {topic}.",
            f"Give me a three-paragraph summary of what one should know about {topic}.",
            f"Write a diary entry of someone who discovers a {word} in an old house.",
        ]
    )


def arithmetic(pick: random.Random) -> str:
    name, other = pick.sample(NAMES, 2)
    thing = pick.choice(THINGS)
    a, b, c = pick.randrange(3, 60), pick.randrange(2, 20), pick.randrange(2, 9)
    return pick.choice(
        [
            f"{name} has {a + b} {thing} and gives {b} of them to {other}. Then {name} buys {c} times as many as are left. How many {thing} does {name} have now?",
            f"A box holds {c} {thing}. {name} fills {a} boxes and has {b} {thing} left over. How many {thing} are there in all?",
            f"{name} earns {a} dollars an hour and works {c} hours a day. How much does {name} earn in {b} days?",
            f"A train travels {a * 3} kilometers in {c} hours. How far does it travel in {b} hours at the same speed?",
            f"{name} reads {b} pages a day. How many days does a book of {a * b} pages take, and how many pages are read after {c} days?",
            f"{other} is {c} years older than {name}. Together they are {2 * a + c} years old. How old is each of them?",
            f"A shirt costs {a} dollars. During a sale it is {c * 10} percent cheaper. What does {name} pay for {b} shirts?",
            f"Solve for x: {c}x + {b} = {c * a + b}.",
            f"What is {a} times {b} minus {c}? Show your steps.",
            f"At {pick.choice(PLACES)}, {a} visitors come on Monday, twice as many on Tuesday and {b} fewer on Wednesday than on Tuesday. How many come in total?",
        ]
    )


def reasoning(pick: random.Random) -> str:
    a, b, c = pick.sample(NAMES, 3)
    topic = pick.choice(TOPICS)
    return pick.choice(
        [
            f"{a} is taller than {b}, and {b} is taller than {c}. Who is the shortest? Explain.",
            f"If all {pick.choice(THINGS)} are red and {a} has one of them, what color is it? Explain your reasoning.",
            f"{a} left before {b} but after {c}. In which order did they leave?",
            f"{a} says that {b} lies. {b} says that {c} lies. Can both be right? Think step by step.",
            f"Is the following argument valid? Everyone who studies {topic} is curious. {a} is curious. So {a} studies {topic}.",
            f"Give three arguments for and three against spending more on {topic}.",
            f"You overtake the person in {pick.choice(['second', 'third', 'last'])} place of a race. In which place are you now? Explain.",
            f"Which of these does not belong with the others, and why: {', '.join(pick.sample(WORDS, 4))}?",
            f"What could be the causes of a sudden interest in {topic}? Rank them by likelihood.",
        ]
    )


def code(pick: random.Random) -> str:
    task = pick.choice(CODE)
    return pick.choice(
        [
            f"Write a Python function that {task}.",
            f"Write a function in Python that {task}, with a docstring and an example.",
            f"Write a program in {pick.choice(['JavaScript', 'Java', 'C++', 'Go', 'Rust'])} that {task}.",
            f"Explain step by step how a function that {task} works, then write it in Python.",
            f"Write unit tests for a Python function that {task}.",
        ]
    )


def lists(pick: random.Random) -> str:
    topic = pick.choice(TOPICS)
    n = pick.randrange(3, 11)
    return pick.choice(
        [
            f"List {n} facts about {topic}.",
            f"Give me {n} tips on {topic}.",
            f"Suggest {n} questions for an interview about {topic}.",
            f"Make a table with {n} rows about {topic}.",
            f"Create a {n}-day plan to learn about {topic}.",
            f"Name {n} books that somebody interested in {topic} might like, with one sentence on each.",
            f"Write {n} multiple-choice questions about {topic}, with answers.",
            f"What are {n} steps to get started with {topic}?",
        ]
    )


def role_play(pick: random.Random) -> str:
    role, topic = pick.choice(ROLES), pick.choice(TOPICS)
    return pick.choice(
        [
            f"Pretend that you are {role}. Tell me what you think about {topic}.",
            f"You are {role}. Introduce yourself and describe a normal day.",
            f"Answer as {role} would: why does {topic} matter?",
            f"Imagine that you are {role} who has to explain {topic} to a crowd. What do you say?",
        ]
    )


def translation(pick: random.Random) -> str:
    sentence, language = pick.choice(SENTENCES), pick.choice(LANGUAGES)
    return pick.choice([f"Translate into {language}: {sentence}", f"How do you say this in {language}? {sentence}"])


def on_a_passage(pick: random.Random) -> str:
    text = passage(pick)
    return pick.choice(
        [
            f"Summarize the following text in two sentences.\n\n{text}",
            f"{text}\n\nWho is mentioned in this text, and what did they do?",
            f"Extract all numbers of the following text with their meaning, as JSON.\n\n{text}",
            f"Extract the names and the places of the text as a list.\n\n{text}",
            f"Rewrite the following text in a more formal style.\n\n{text}",
            f"Use the text to answer: what was the hardest time, and why?\n\nText: {text}",
            f"Correct and shorten this paragraph: {text}",
            f"Context: {text}\n\nContext: {passage(pick)}\n\nQuestion: What do the two businesses have in common?",
            f"Write three questions that the following text answers, with the answers.\n\n{text}",
        ]
    )


MAKERS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    "question": (question, 5),
    "writing": (writing, 4),
    "arithmetic": (arithmetic, 4),
    "reasoning": (reasoning, 2),
    "code": (code, 3),
    "lists": (lists, 2),
    "role_play": (role_play, 2),
    "translation": (translation, 2),
    "on_a_passage": (on_a_passage, 4),
}
"""How each category is made, and its share."""


FACTS = {
    "Who wrote {}?": "Hamlet|Pride and Prejudice|The Odyssey|Moby-Dick|War and Peace|Don Quixote|Frankenstein|Dracula|The Hobbit|Emma|Faust|1984|Dune|Ulysses",
    "What is the capital of {}?": "Norway|Peru|Kenya|Thailand|Canada|Portugal|Vietnam|Chile|Egypt|Poland|Ghana|Nepal|Cuba|Iceland|Jordan|Mongolia|Morocco|Fiji",
    "When was {} invented?": "the telephone|the steam engine|the bicycle|the microscope|the compass|paper|the piano|the light bulb|the zipper|the radio|the camera|the battery",
    "Where does the name {} come from?": "Anna|Smith|Europe|Amazon|Wednesday|August|Alexander|Sahara|Texas|Baker|Venus|Oxford|Brazil|Margaret|tulip|coffee",
    "How many {} are there?": "bones in the human body|countries in Africa|moons of Jupiter|keys on a piano|players in a rugby team|time zones|elements|states in Germany",
    "Who discovered {}?": "penicillin|gravity|oxygen|radium|X-rays|the electron|Neptune|the structure of DNA|vaccination|the law of buoyancy|insulin|the neutron",
    "What does {} stand for?": "NASA|HTML|UNESCO|DNA|RADAR|CEO|GPS|PDF|USB|NATO|ATM|LASER|RAM|FIFA|WiFi",
    "When did {} begin?": "the First World War|the Renaissance|the Olympic Games|the space age|the Middle Ages|the Great Depression|the French Revolution|the Ice Age",
    "Where is {} made?": "champagne|parmesan|silk|rubber|maple syrup|cork|tequila|porcelain|saffron|amber jewelry|paper money|olive oil",
    "What is the main purpose of {}?": "a carburetor|the liver|the United Nations|a constitution|a firewall|the ozone layer|red blood cells|a central bank|a lighthouse",
    "Who plays the lead in a film about {}?": "a shipwreck|a boxer|a wizard school|a lost dinosaur park|a jazz pianist|a spy|a talking toy|a chess champion",
}
GERMAN = {
    "wer": "Der Minister|Die Firma|Ein Sprecher der Stadt|Die Feuerwehr|Der junge Trainer|Die Regierung|Mein Nachbar|Das Museum|Die Lehrerin|Der Verein|Die Bank|Ein Zeuge",
    "hat": "hat|hatte|wird|will|konnte|muss|soll|möchte",
    "wann": "am Dienstag|im vergangenen Jahr|seit der Krise|nach langer Diskussion|trotz des Regens|in diesem Sommer|kurz vor Mitternacht|wegen der hohen Kosten|heute",
    "was": "den neuen Vertrag|das alte Rathaus|die Zahl der Besucher|ein zweites Büro|den Streit um die Straße|die Preise für Strom|das Ergebnis der Wahl|eine Brücke über den Fluss",
    "wo": "in München|an der Grenze|im Norden des Landes|vor dem Bahnhof|in der Mittelschule|auf dem Markt|bei den Verhandlungen|im Parlament",
}
SINCE = """weil die Kosten gestiegen sind|obwohl viele dagegen waren|damit die Kinder sicher zur Schule kommen|was niemand erwartet hatte
wie die Polizei am Abend mitteilte|nachdem der Regen aufgehört hatte""".replace("\n", "|").split("|")
VERBS = {"hat": "vorgestellt|verkauft|erklärt|verloren|gefunden|gelobt", "wird": "vorstellen|verkaufen|erklären|verlieren|finden|loben"}


def fact(pick: random.Random) -> str:
    form = pick.choice(list(FACTS))
    asked = form.format(pick.choice(FACTS[form].split("|")))
    return pick.choice([asked, asked[0].lower() + asked[1:-1], asked])


def german(pick: random.Random) -> str:
    who, has, when, what, where = (pick.choice(words.split("|")) for words in GERMAN.values())
    done = pick.choice(VERBS["hat" if has in ("hat", "hatte") else "wird"].split("|"))
    sentence = pick.choice(
        [f"{who} {has} {when} {what} {where} {done}", f"{when[0].upper()}{when[1:]} {has} {who[0].lower()}{who[1:]} {where} {what} {done}"]
    )
    if pick.random() < 0.4:
        sentence += f" , {pick.choice(SINCE)}"
    return f"Translate German to English: {sentence} ."


def article(pick: random.Random, texts: list[str], longest: int) -> str:
    """Some of what the model wrote, one text after the other, up to about `longest` characters."""
    parts: list[str] = []
    while sum(map(len, parts)) < longest * 0.7:
        parts.append(pick.choice(texts))
    return "\n\n".join(parts)[:longest]


def summary(pick: random.Random, texts: list[str]) -> str:
    text = article(pick, texts, pick.randrange(900, 3500))
    return pick.choice(
        [f"Summarize: {text}", f"Summarize the following article in three sentences.\n\n{text}", f"{text}\n\nGive a short summary of this."]
    )


def retrieval(pick: random.Random, texts: list[str]) -> str:
    passages = [pick.choice(texts)[: pick.randrange(400, 900)] for _ in range(pick.randrange(2, 5))]
    asked = pick.choice(
        [
            "What is the main point of the passages above?",
            "Using the text above, what are the most important facts?",
            f"Based on the passages, how does this relate to {pick.choice(TOPICS)}?",
            f"According to the text, what happens when {pick.choice(TOPICS)} changes?",
            "Which of these passages is the most useful, and why?",
            "Who or what is described here? Answer with the passages above.",
        ]
    )
    return "\n\n".join([*passages, asked])


def records(prompts: dict[str, str]) -> list[dict[str, object]]:
    """What is written: each prompt with its category."""
    return [{"category": name, "messages": [{"role": "user", "content": text}]} for text, name in prompts.items()]


def make_on_articles(count: int, texts: list[str], seed: int = 0) -> list[dict[str, object]]:
    """`count` different prompts, half of them on `texts`."""
    pick = random.Random(seed)
    makers = {
        "summary": lambda: summary(pick, texts),
        "retrieval": lambda: retrieval(pick, texts),
        "fact": lambda: fact(pick),
        "german": lambda: german(pick),
    }
    prompts = {}
    while len(prompts) < count:
        name = pick.choice(list(makers))
        prompts[makers[name]()] = name
    return records(prompts)


def articles(data: Path, model: str) -> list[str]:
    """The long answers of a data file, as text."""
    from transformers import AutoTokenizer

    from specfx.train.data import read_texts

    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = (text.output for text in read_texts(data) if text.category in ("question", "writing", "lists") and len(text.output) > 120)
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


OPENINGS = {"": (14, 120), "Summarize: The": (2, 320), "Who": (1, 40), "When": (1, 40), "Where": (1, 40), "{name} has": (2, 100)}
"""How a user's turn begins: (share, most tokens that the model writes on)."""
DRAWN = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 0.95, "num_return_sequences": 32}


def asked(count: int, model: str, seed: int = 0) -> list[dict[str, object]]:
    """`count` different prompts that the model itself asks. What does not end in time is left out, but for texts to be summarised."""
    import torch
    from tqdm import tqdm

    import specfx
    from specfx import models

    pick = random.Random(seed)
    target, tokenizer = models.load(model, torch.bfloat16)
    specfx.speculate(target, None, compile="sync")
    torch.manual_seed(seed)
    before = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False).split("\0")[0]
    openings = [opening for opening, (share, _) in OPENINGS.items() for _ in range(share)]
    prompts: dict[str, str] = {}
    with tqdm(total=count, unit="prompt") as bar:
        while len(prompts) < count:
            opening = pick.choice(openings)
            begun, longest = opening.format(name=pick.choice(NAMES)), OPENINGS[opening][1]
            ids = tokenizer(before + begun, add_special_tokens=False, return_tensors="pt").input_ids
            for row in target.generate(ids, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id, **DRAWN).tolist():
                written, *ended = tokenizer.decode(row[ids.shape[1] :]).split(tokenizer.eos_token)
                text = (begun + written).strip()
                if (ended or begun.startswith("Summarize")) and len(text) > 12 and "<|" not in text and text not in prompts:
                    prompts[text] = "asked_" + (opening.split(" ")[0].strip("{}:").lower() or "freely")
            bar.update(len(prompts) - bar.n)
    return records(prompts)[:count]


def make(count: int, seed: int = 0) -> list[dict[str, object]]:
    """`count` different prompts."""
    pick = random.Random(seed)
    names = [name for name, (_, share) in MAKERS.items() for _ in range(share)]
    prompts: dict[str, str] = {}
    while len(prompts) < count:
        name = pick.choice(names)
        prompts.setdefault(MAKERS[name][0](pick), name)
    return records(prompts)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--count", type=int, default=6000)
    arguments.add_argument("--also", type=Path, nargs="*", default=[])
    arguments.add_argument("--articles", type=Path)
    arguments.add_argument("--asked", action="store_true")
    arguments.add_argument("--model")
    options = arguments.parse_args()
    if (options.asked or options.articles) and not options.model:
        arguments.error("--asked and --articles need --model")
    if options.asked:
        prompts = asked(options.count, options.model, options.seed)
    elif options.articles:
        prompts = make_on_articles(options.count, articles(options.articles, options.model), options.seed)
    else:
        prompts = make(options.count, options.seed)
    for file in options.also:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            text = record.get("question") or record["prompt"]
            prompts += records({text: file.stem})
    random.Random(options.seed).shuffle(prompts)
    options.out.write_text("".join(json.dumps(p) + "\n" for p in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts in {options.out}")


if __name__ == "__main__":
    main()
