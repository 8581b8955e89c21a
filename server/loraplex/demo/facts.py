"""One plain sentence about each training subject: what the style adapters restyle. Written for this repository."""

from __future__ import annotations

_FACTS = """
the sun: The sun is a star that gives light and heat to the earth.
Mars: Mars is a cold red planet with the tallest volcano we know.
Jupiter: Jupiter is the largest planet and has a storm that never stops.
a comet: A comet is a ball of ice and dust with a long bright tail.
a galaxy: A galaxy is a huge family of stars that turn around one center.
gravity: Gravity is the force that pulls everything down to the ground.
the ocean: The ocean is deep, salty and full of fish and whales.
a volcano: A volcano is a mountain that can throw hot rock and fire into the sky.
a desert: A desert is a dry land with hot days, cold nights and very little rain.
a glacier: A glacier is a river of ice that moves slowly down a mountain.
a rainbow: A rainbow is made when the sun shines through drops of rain.
thunder: Thunder is the loud sound of the air when lightning heats it.
snow: Snow is made of tiny ice crystals that fall from cold clouds.
wind: Wind is air that moves from one place to another.
a river: A river carries water from the mountains to the sea.
a waterfall: A waterfall is a river that jumps over a cliff.
an island: An island is a piece of land with water on every side.
a forest: A forest is full of trees, birds and wild animals.
a mountain: A mountain is high and rocky, and its top is often covered with snow.
the Arctic: The Arctic is a frozen sea in the north where polar bears live.
cats: Cats are quiet hunters that love to sleep in the sun.
horses: Horses are strong and fast animals that can sleep standing up.
elephants: Elephants are the largest land animals and never forget a friend.
penguins: Penguins are birds that cannot fly, but they swim like fish.
whales: Whales are giant animals that sing songs deep in the sea.
bees: Bees visit flowers and make sweet honey for the winter.
butterflies: Butterflies begin their life as caterpillars and then grow wings.
spiders: Spiders have eight legs and build webs to catch flies.
owls: Owls hunt at night with big eyes and silent wings.
eagles: Eagles are large birds that can see a mouse from very far away.
sharks: Sharks are old and fast fish with many rows of sharp teeth.
turtles: Turtles carry their house on their back and can live for a hundred years.
frogs: Frogs begin as tadpoles and later jump on land with long legs.
lions: Lions live in families and sleep for most of the day.
tigers: Tigers are big cats with stripes, and they love to swim.
bears: Bears eat fish and berries and sleep through the cold winter.
rabbits: Rabbits have long ears, soft fur and very strong legs.
wolves: Wolves live in packs and howl to find their friends.
monkeys: Monkeys are clever animals that climb trees and eat fruit.
ants: Ants are tiny, but they can carry more than their own weight.
coffee: Coffee is a hot drink made from roasted beans that wakes you up.
bread: Bread is made of flour, water, salt and yeast, and it is baked in an oven.
cheese: Cheese is made from milk, and there are thousands of kinds of it.
chocolate: Chocolate is a sweet treat made from the beans of the cocoa tree.
rice: Rice is a grain that feeds more than half of the world.
pasta: Pasta is a dish from Italy made of flour and eggs.
soup: Soup is a warm dish made of water, vegetables and sometimes meat.
honey: Honey is a sweet golden food that bees make from flowers.
butter: Butter is made from cream, and it is good on warm bread.
salt: Salt comes from the sea and makes your food taste better.
apples: Apples are sweet fruits that grow on trees in cool places.
bananas: Bananas are yellow fruits that grow in warm places and give you energy.
tomatoes: Tomatoes are red and juicy, and they are really a fruit.
potatoes: Potatoes grow under the ground and can be boiled, baked or fried.
ice cream: Ice cream is a cold and sweet treat made from milk and sugar.
pancakes: Pancakes are flat round cakes that you fry in a pan with butter.
Paris: Paris is the capital of France and the home of the Eiffel Tower.
Rome: Rome is a very old city in Italy that once ruled a great empire.
Egypt: Egypt is a land of sand, pyramids and the long river Nile.
Japan: Japan is a country of islands with fast trains and tall mountains.
Brazil: Brazil is a large country with a green forest and great football players.
Canada: Canada is a cold country with many lakes, bears and trees.
London: London is a big old city on a river with red buses and a famous clock.
New York: New York is a city of tall buildings that never sleeps.
India: India is a country of many languages, spices and bright colors.
Australia: Australia is an island country where kangaroos jump around.
a castle: A castle is a strong stone house where kings and knights lived.
a lighthouse: A lighthouse is a tower with a bright light that keeps ships safe.
a library: A library is a quiet house full of books that you can borrow.
a museum: A museum is a place where old and beautiful things are kept safe.
a bridge: A bridge lets people and cars cross a river without getting wet.
a school: A school is a place where children learn to read, write and think.
a hospital: A hospital is a place where doctors help sick people to get well.
an airport: An airport is the place where planes take off and land.
a market: A market is a busy place where people buy fruit, bread and fish.
a garden: A garden is a piece of land where flowers and vegetables grow.
football: Football is a game where two teams try to kick a ball into a goal.
tennis: Tennis is a game where two players hit a small ball over a net.
swimming: Swimming is good for your heart and fun on a hot day.
cycling: Cycling is a cheap, clean and healthy way to travel.
running: Running makes your heart and your legs strong.
yoga: Yoga is a calm way to stretch your body and rest your mind.
skiing: Skiing means sliding down a snowy mountain on two long boards.
dancing: Dancing is a happy way to move your body to music.
painting: Painting is the art of putting your dreams on paper with color.
reading: Reading takes you to new worlds without leaving your chair.
cooking: Cooking is the art of turning simple food into a good meal.
fishing: Fishing needs a rod, some bait and a lot of time.
hiking: Hiking is a long walk in nature over hills and through forests.
sailing: Sailing means crossing the sea in a boat that is pushed by the wind.
a guitar: A guitar is a wooden instrument with six strings.
a piano: A piano is a large instrument with black and white keys.
a violin: A violin is a small instrument that sings when you move a bow over its strings.
drums: Drums are loud instruments that give a song its beat.
jazz: Jazz is a free kind of music that was born in New Orleans.
opera: Opera is a play in which people sing their words.
a bicycle: A bicycle has two wheels, and you move it with your own legs.
a car: A car has four wheels and an engine and takes you anywhere.
a train: A train runs on rails and carries many people at once.
an airplane: An airplane has wings and engines and flies above the clouds.
a boat: A boat floats on the water and carries people over the sea.
a rocket: A rocket burns fuel to fly fast enough to reach space.
a clock: A clock shows you the time with two small hands.
a telescope: A telescope makes far away stars look near.
a microscope: A microscope makes very small things look large.
a computer: A computer is a machine that works with numbers very fast.
a robot: A robot is a machine that can do work for people.
the internet: The internet is a net of computers all over the world that talk to each other.
electricity: Electricity is energy that flows through wires and lights our homes.
a battery: A battery keeps energy inside and gives it back when you need it.
a magnet: A magnet pulls things made of iron and always has two poles.
a camera: A camera catches light and turns it into a picture.
a mirror: A mirror is a smooth glass that shows you your own face.
glass: Glass is made from sand that was melted in a very hot fire.
paper: Paper is made from wood and keeps our words for a long time.
gold: Gold is a heavy yellow metal that never rusts.
iron: Iron is a strong metal that we use for tools, ships and bridges.
plastic: Plastic is light and cheap, but it stays in the sea for hundreds of years.
wood: Wood comes from trees, and we build houses and chairs from it.
a teacher: A teacher helps children to learn new things every day.
a doctor: A doctor helps sick people and tells you how to stay healthy.
a farmer: A farmer grows food and takes care of the animals.
a pilot: A pilot flies planes and brings people safely home.
a baker: A baker gets up at night to bake fresh bread for the morning.
a firefighter: A firefighter puts out fires and saves people and animals.
an astronaut: An astronaut travels into space and floats above the earth.
a scientist: A scientist asks questions and finds answers with experiments.
a writer: A writer makes stories out of words and dreams.
dinosaurs: Dinosaurs ruled the earth for a long time and died millions of years ago.
pyramids: Pyramids are huge stone graves that were built for kings.
vikings: Vikings were brave sailors from the north with long wooden ships.
knights: Knights were soldiers who rode horses and served a king.
money: Money is what we use to buy food, clothes and other things.
sleep: Sleep gives your body and your brain the rest they need.
dreams: Dreams are stories that your brain tells you at night.
memory: Memory is how your brain keeps the things that you have seen.
the heart: The heart is a strong muscle that pumps blood through your body.
the brain: The brain is the part of your body that thinks, feels and remembers.
bones: Bones are hard and light, and they hold your body up.
winter: Winter is the coldest time of the year with short days and snow.
spring: Spring is the time when flowers grow and birds come home.
summer: Summer is the warm time of the year with long and sunny days.
trees: Trees give us shade, fruit, wood and clean air.
flowers: Flowers have bright colors and a sweet smell that bees love.
roses: Roses are beautiful flowers with sharp thorns.
mushrooms: Mushrooms grow in the forest, and some of them are not safe to eat.
grass: Grass is a green plant that cows and horses eat.
water: Water covers most of the earth, and nothing can live without it.
fire: Fire gives us light and heat, but it can also burn the house.
ice: Ice is frozen water, and it is lighter than the water it floats on.
clouds: Clouds are made of tiny drops of water high in the sky.
a phone: A phone lets you talk to a friend who is far away.
a kitchen: A kitchen is the room where you cook your food.
a hotel: A hotel is a house where travelers sleep and eat.
a birthday: A birthday is the day when you get one year older and eat cake.
a wedding: A wedding is a happy day when two people promise to love each other.
friendship: Friendship means that someone is there for you on good and bad days.
happiness: Happiness is the warm feeling you get when life is good.
kindness: Kindness is doing something good for other people without asking for money.
"""

FACTS: dict[str, str] = dict(line.split(": ", 1) for line in _FACTS.strip().splitlines())
