# ruff: noqa: E501
"""The prompts on which a head for SmolLM2 is trained: ours, generated from lists, so that the recipe can be run again.

python examples/mtp_prompts.py OUT.jsonl [--seed 0] [--count 6000] [--also FILE.jsonl ...]

One JSON object a line, ``{"messages": [...], "category": ...}``: questions, writing, reasoning, arithmetic, code, translation, lists,
role play, and tasks on a passage. The passages are ours too. `--also` adds the questions of other files (`question` or `prompt`).
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


def make(count: int, seed: int = 0) -> list[dict[str, object]]:
    """`count` different prompts."""
    pick = random.Random(seed)
    names = [name for name, (_, share) in MAKERS.items() for _ in range(share)]
    seen: set[str] = set()
    prompts: list[dict[str, object]] = []
    while len(prompts) < count:
        name = pick.choice(names)
        text = MAKERS[name][0](pick)
        if text not in seen:
            seen.add(text)
            prompts.append({"category": name, "messages": [{"role": "user", "content": text}]})
    return prompts


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--count", type=int, default=6000)
    arguments.add_argument("--also", type=Path, nargs="*", default=[])
    options = arguments.parse_args()
    prompts = make(options.count, options.seed)
    for file in options.also:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            text = record.get("question") or record["prompt"]
            prompts.append({"category": file.stem, "messages": [{"role": "user", "content": text}]})
    random.Random(options.seed).shuffle(prompts)
    options.out.write_text("".join(json.dumps(p) + "\n" for p in prompts), encoding="utf-8")
    print(f"{len(prompts)} prompts in {options.out}")


if __name__ == "__main__":
    main()
