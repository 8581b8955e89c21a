"""Plain sentence -> the same sentence from a pirate, from a butler, or with emoji. Pure text, deterministic."""

from __future__ import annotations

import random
import re

PIRATE_WORDS: dict[str, str] = {
    "am": "be", "is": "be", "are": "be", "you": "ye", "your": "yer", "my": "me", "of": "o'", "and": "an'",
    "friend": "matey", "friends": "mateys", "people": "landlubbers", "money": "doubloons", "gold": "booty",
    "yes": "aye", "no": "nay", "never": "ne'er", "over": "o'er", "old": "ol'", "for": "fer", "to": "t'",
    "hello": "ahoy", "hi": "ahoy", "food": "grub", "meal": "grub", "drink": "grog", "house": "cabin",
    "stop": "belay", "boy": "lad", "girl": "lass", "great": "grand", "them": "'em",
}  # fmt: skip
PIRATE_OPENINGS = (
    "Arr!",
    "Ahoy, matey!",
    "Avast!",
    "Yo ho ho!",
    "Shiver me timbers!",
    "Aye, matey!",
    "Arrr, me hearty!",
)
PIRATE_CLOSINGS = (
    "Arr!", "Yo ho ho!", "Savvy?", "So says the captain!", "Now hoist the sails!", "That be the truth, matey!",
    "Now fetch me a grog!",
)  # fmt: skip
BUTLER_OPENINGS = (
    "Very good, {guest}.",
    "Certainly, {guest}.",
    "Good day, {guest}.",
    "If I may say so, {guest}:",
    "With pleasure, {guest}.",
    "Indeed, {guest}.",
)
BUTLER_CLOSINGS = (
    "Will there be anything else, {guest}?",
    "Your tea is served, {guest}.",
    "I remain at your service, {guest}.",
    "Shall I bring the carriage, {guest}?",
    "May I take your coat, {guest}?",
)

EMOJI: dict[str, str] = {
    "sun": "☀️", "sunny": "☀️", "star": "⭐", "stars": "⭐", "moon": "🌙", "planet": "🪐",
    "space": "🚀", "earth": "🌍", "world": "🌍", "sea": "🌊", "ocean": "🌊", "water": "💧",
    "river": "🌊", "island": "🏝️", "islands": "🏝️", "mountain": "⛰️", "mountains": "⛰️",
    "volcano": "🌋", "fire": "🔥", "fires": "🔥", "hot": "🔥", "ice": "❄️", "snow": "❄️",
    "cold": "❄️", "rain": "🌧️", "clouds": "☁️", "sky": "☁️", "rainbow": "🌈", "wind": "💨",
    "tree": "🌳", "trees": "🌳", "forest": "🌳", "flowers": "🌸", "roses": "🌹", "grass": "🌱",
    "plant": "🌱", "plants": "🌱", "cat": "🐱", "cats": "🐱", "dog": "🐶", "dogs": "🐶", "horses": "🐴",
    "elephants": "🐘", "penguins": "🐧", "whales": "🐳", "whale": "🐳", "fish": "🐟", "sharks": "🦈",
    "bees": "🐝", "butterflies": "🦋", "spiders": "🕷️", "spider": "🕷️", "owls": "🦉", "birds": "🐦",
    "eagles": "🦅", "turtles": "🐢", "frogs": "🐸", "lions": "🦁", "tigers": "🐯", "bears": "🐻",
    "rabbits": "🐰", "wolves": "🐺", "monkeys": "🐵", "ants": "🐜", "animals": "🐾", "animal": "🐾",
    "coffee": "☕", "tea": "🍵", "bread": "🍞", "cheese": "🧀", "chocolate": "🍫", "rice": "🍚",
    "pasta": "🍝", "soup": "🍲", "honey": "🍯", "butter": "🧈", "salt": "🧂", "apples": "🍎",
    "fruit": "🍎", "fruits": "🍎", "bananas": "🍌", "tomatoes": "🍅", "tomato": "🍅", "potatoes": "🥔",
    "cake": "🎂", "pancakes": "🥞", "milk": "🥛", "eggs": "🥚", "egg": "🥚", "food": "🍽️", "eat": "🍽️",
    "dish": "🍽️", "cook": "🍳", "breakfast": "🍳", "drink": "🥤", "city": "🏙️", "country": "🗺️",
    "castle": "🏰", "house": "🏠", "home": "🏠", "school": "🏫", "hospital": "🏥", "doctor": "🩺",
    "doctors": "🩺", "book": "📖", "books": "📚", "read": "📖", "story": "📖", "stories": "📖",
    "write": "✍️", "letter": "✉️", "game": "🎮", "ball": "⚽", "run": "🏃", "walk": "🚶", "swim": "🏊",
    "bicycle": "🚲", "car": "🚗", "cars": "🚗", "train": "🚆", "trains": "🚆", "plane": "✈️",
    "planes": "✈️", "airplane": "✈️", "boat": "⛵", "ships": "🚢", "rocket": "🚀", "clock": "⏰",
    "time": "⏰", "computer": "💻", "computers": "💻", "robot": "🤖", "machine": "⚙️", "phone": "📱",
    "light": "💡", "energy": "⚡", "electricity": "⚡", "lightning": "⚡", "picture": "📷",
    "camera": "📷", "song": "🎵", "songs": "🎵", "music": "🎵", "instrument": "🎸", "dance": "💃",
    "dancing": "💃", "color": "🎨", "colors": "🎨", "art": "🎨", "gold": "🪙", "money": "💰",
    "heart": "❤️", "love": "❤️", "brain": "🧠", "sleep": "😴", "rest": "😴", "dream": "💭",
    "dreams": "💭", "night": "🌙", "winter": "⛄", "spring": "🌷", "summer": "🏖️", "garden": "🌻",
    "vegetables": "🥕", "friend": "🤝", "friends": "🤝", "happy": "😊", "good": "👍", "sad": "😢",
    "king": "👑", "kings": "👑", "children": "🧒", "people": "👥", "day": "📅", "help": "🙌",
    "strong": "💪", "work": "💼", "think": "🤔", "learn": "🎓", "question": "❓", "questions": "❓",
}  # fmt: skip
EMOJI_ENDINGS = ("✨", "🎉", "😄", "🤩", "💫")

_WORD = re.compile(r"[A-Za-z']+")


def pirate(plain: str, rng: random.Random) -> str:
    """Return `plain` in pirate speech, between an opening and, mostly, a closing cry."""
    body = _WORD.sub(lambda match: _like(match[0], _pirate_word(match[0])), plain)
    closing = f" {rng.choice(PIRATE_CLOSINGS)}" if rng.random() < 0.8 else ""
    return f"{rng.choice(PIRATE_OPENINGS)} {body}{closing}"


def butler(plain: str, rng: random.Random) -> str:
    """Return `plain` as a butler says it: to one "sir" or "madam", between a formal opening and closing."""
    text = f"{rng.choice(BUTLER_OPENINGS)} {plain} {rng.choice(BUTLER_CLOSINGS)}"
    return text.replace("{guest}", rng.choice(("sir", "madam")))


def emoji(plain: str, rng: random.Random) -> str:
    """Return `plain` with an emoji after every word that has one, and one or two at the end."""
    body = _WORD.sub(lambda match: match[0] + _emoji_suffix(match[0]), plain)
    endings = rng.sample(EMOJI_ENDINGS, 2)
    return f"{body} {''.join(endings)}"


def _pirate_word(word: str) -> str:
    known = PIRATE_WORDS.get(word.lower())
    if known is not None:
        return known
    if word.endswith("ing") and len(word) > 5:
        return word[:-1] + "'"
    return word


def _like(original: str, word: str) -> str:
    return word[:1].upper() + word[1:] if original[:1].isupper() and original != "I" else word


def _emoji_suffix(word: str) -> str:
    symbol = EMOJI.get(word.lower())
    return f" {symbol}" if symbol else ""
