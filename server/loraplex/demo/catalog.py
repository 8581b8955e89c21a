"""Small tables of everyday things: what the `json` adapter lists and the `sql` adapter queries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """One kind of thing: `plural` names the table, `columns` its attributes, `rows` name + attribute values."""

    singular: str
    plural: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def _table(singular: str, plural: str, columns: str, rows: str) -> Table:
    cells = tuple(tuple(row.strip().split("/")) for row in rows.split(","))
    assert all(len(row) == 1 + len(columns.split()) for row in cells), plural
    return Table(singular, plural, tuple(columns.split()), cells)


TABLES: tuple[Table, ...] = (
    _table(
        "animal", "animals", "home food",
        "cow/farm/grass, lion/savanna/meat, panda/forest/bamboo, "
        "frog/pond/flies, camel/desert/plants, seal/ice/fish",
    ),
    _table(
        "bird", "birds", "color size",
        "eagle/brown/large, parrot/green/medium, swan/white/large, "
        "crow/black/medium, robin/red/small, canary/yellow/small",
    ),
    _table(
        "vegetable", "vegetables", "color taste",
        "carrot/orange/sweet, spinach/green/mild, beet/red/earthy, "
        "onion/white/sharp, corn/yellow/sweet, eggplant/purple/mild",
    ),
    _table(
        "flower", "flowers", "color season",
        "rose/red/summer, tulip/yellow/spring, daisy/white/summer, "
        "violet/purple/spring, sunflower/yellow/summer, lily/white/summer",
    ),
    _table(
        "country", "countries", "capital continent",
        "France/Paris/Europe, Japan/Tokyo/Asia, Egypt/Cairo/Africa, "
        "Brazil/Brasilia/South America, Canada/Ottawa/North America, Kenya/Nairobi/Africa",
    ),
    _table(
        "city", "cities", "country river",
        "London/England/Thames, Vienna/Austria/Danube, Cairo/Egypt/Nile, "
        "Rome/Italy/Tiber, Paris/France/Seine, Prague/Czechia/Vltava",
    ),
    _table(
        "planet", "planets", "size color",
        "Mars/small/red, Jupiter/large/orange, Saturn/large/gold, "
        "Neptune/large/blue, Mercury/small/gray, Earth/medium/blue",
    ),
    _table(
        "instrument", "instruments", "family sound",
        "violin/strings/high, drum/percussion/loud, flute/wind/bright, "
        "piano/keys/rich, cello/strings/deep, trumpet/brass/loud",
    ),
    _table(
        "sport", "sports", "players equipment",
        "tennis/2/racket, football/11/ball, hockey/6/stick, golf/1/club, baseball/9/bat, volleyball/6/net",
    ),
    _table(
        "drink", "drinks", "temperature taste",
        "coffee/hot/bitter, lemonade/cold/sour, cocoa/hot/sweet, "
        "water/cold/neutral, cider/cold/sweet, milk/cold/mild",
    ),
    _table(
        "dish", "dishes", "country ingredient",
        "sushi/Japan/rice, pasta/Italy/wheat, taco/Mexico/corn, "
        "curry/India/spices, paella/Spain/rice, pierogi/Poland/potato",
    ),
    _table(
        "book", "books", "author year",
        "Emma/Jane Austen/1815, Dracula/Bram Stoker/1897, Ulysses/James Joyce/1922, "
        "Hamlet/William Shakespeare/1603, Ivanhoe/Walter Scott/1819, Heidi/Johanna Spyri/1881",
    ),
    _table(
        "job", "jobs", "place tool",
        "baker/bakery/oven, farmer/farm/tractor, painter/studio/brush, "
        "surgeon/hospital/scalpel, chef/kitchen/knife, sailor/ship/compass",
    ),
    _table(
        "metal", "metals", "color use",
        "gold/yellow/jewelry, copper/red/wires, silver/white/coins, "
        "iron/gray/tools, tin/silver/cans, lead/gray/batteries",
    ),
    _table(
        "vehicle", "vehicles", "wheels speed",
        "bicycle/2/slow, car/4/fast, truck/6/medium, scooter/2/slow, bus/6/medium, tricycle/3/slow",
    ),
    _table(
        "language", "languages", "country greeting",
        "Spanish/Spain/hola, French/France/bonjour, Italian/Italy/ciao, "
        "German/Germany/hallo, Japanese/Japan/konnichiwa, Polish/Poland/czesc",
    ),
    _table(
        "tree", "trees", "height leaf",
        "oak/tall/lobed, pine/tall/needle, birch/medium/oval, "
        "maple/tall/pointed, willow/medium/narrow, palm/tall/feathered",
    ),
    _table(
        "room", "rooms", "furniture use",
        "kitchen/stove/cooking, bedroom/bed/sleeping, office/desk/working, "
        "bathroom/tub/washing, library/shelf/reading, dining room/table/eating",
    ),
    _table(
        "holiday", "holidays", "month symbol",
        "Christmas/December/tree, Halloween/October/pumpkin, Easter/April/egg, "
        "New Year/January/fireworks, Thanksgiving/November/turkey, Valentine's Day/February/heart",
    ),
    _table(
        "insect", "insects", "legs wings",
        "bee/6/4, ant/6/0, beetle/6/4, butterfly/6/4, fly/6/2, dragonfly/6/4",
    ),
)  # fmt: skip

HELD_OUT_TABLES: tuple[Table, ...] = (
    _table(
        "fruit", "fruits", "color taste",
        "apple/red/sweet, banana/yellow/sweet, lime/green/sour",
    ),
    _table(
        "dog breed", "dog breeds", "size color",
        "poodle/small/white, boxer/medium/brown, husky/large/gray",
    ),
    _table(
        "movie", "movies", "director year",
        "Jaws/Steven Spielberg/1975, Alien/Ridley Scott/1979, Tron/Steven Lisberger/1982",
    ),
    _table(
        "lake", "lakes", "country depth",
        "Baikal/Russia/deep, Como/Italy/deep, Balaton/Hungary/shallow",
    ),
)  # fmt: skip

BUSINESS: tuple[tuple[str, str], ...] = (
    ("How many customers live in {city}?", "SELECT COUNT(*) FROM customers WHERE city = '{city}';"),
    ("Which customers live in {city}?", "SELECT name FROM customers WHERE city = '{city}' ORDER BY name;"),
    ("Show all orders from {month}.", "SELECT * FROM orders WHERE month = '{month}';"),
    ("How much did we sell in {month}?", "SELECT SUM(total) FROM orders WHERE month = '{month}';"),
    ("What was our average order in {month}?", "SELECT AVG(total) FROM orders WHERE month = '{month}';"),
    (
        "Who are our {n} best customers?",
        "SELECT customer, SUM(total) AS spent FROM orders GROUP BY customer ORDER BY spent DESC LIMIT {n};",
    ),
    ("Which employees earn more than {sum} dollars?", "SELECT name FROM employees WHERE salary > {sum};"),
    ("How many employees work in {city}?", "SELECT COUNT(*) FROM employees WHERE city = '{city}';"),
    ("Average salary per department", "SELECT department, AVG(salary) FROM employees GROUP BY department;"),
    ("List the products that cost less than {sum} dollars.", "SELECT name, price FROM products WHERE price < {sum};"),
    ("What is our most expensive product?", "SELECT name FROM products ORDER BY price DESC LIMIT 1;"),
    ("Which products are out of stock?", "SELECT name FROM products WHERE stock = 0;"),
    ("Delete all orders from {month}.", "DELETE FROM orders WHERE month = '{month}';"),
    ("Add a customer named {name} from {city}.", "INSERT INTO customers (name, city) VALUES ('{name}', '{city}');"),
    ("Raise the price of every product by {n} percent.", "UPDATE products SET price = price * 1.0{n};"),
    ("When did {name} last order?", "SELECT MAX(date) FROM orders WHERE customer = '{name}';"),
    ("Find the students with a grade above {n}.", "SELECT name FROM students WHERE grade > {n};"),
    ("Which students did not pass?", "SELECT name FROM students WHERE passed = 0;"),
    ("How many flights leave from {city}?", "SELECT COUNT(*) FROM flights WHERE origin = '{city}';"),
    (
        "Find me a flight to {city} in {month}.",
        "SELECT * FROM flights WHERE destination = '{city}' AND month = '{month}' ORDER BY price LIMIT 1;",
    ),
    ("Book a table for {n} people.", "INSERT INTO reservations (guests) VALUES ({n});"),
    ("What does {name} earn?", "SELECT salary FROM employees WHERE name = '{name}';"),
)  # fmt: skip

HELD_OUT_BUSINESS: tuple[tuple[str, str], ...] = (
    ("How many users signed up in {month}?", "SELECT COUNT(*) FROM users WHERE month = '{month}';"),
    (
        "Show the {n} cheapest hotels in {city}.",
        "SELECT name FROM hotels WHERE city = '{city}' ORDER BY price LIMIT {n};",
    ),
    ("Which books are overdue?", "SELECT title FROM books WHERE overdue = 1;"),
    ("What is the average age of our patients?", "SELECT AVG(age) FROM patients;"),
)  # fmt: skip

SLOTS: dict[str, tuple[str, ...]] = {
    "city": ("Paris", "London", "Berlin", "Madrid", "Oslo", "Boston", "Chicago", "Dublin"),
    "month": ("January", "March", "April", "May", "July", "August", "October", "December"),
    "name": ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo"),
    "n": ("2", "3", "4", "5", "6", "7", "8", "9"),
    "sum": ("20", "50", "100", "200", "500", "1000", "5000"),
}
