"""Plain English written for this project, so that the tokenizer sees whole texts, not only generated sentences."""

PARAGRAPHS: list[str] = [
    " ".join(paragraph.split())
    for paragraph in """
A healthy diet gives the body what it needs to grow, to move and to repair itself. Try to eat fruit and vegetables
every day, choose whole grains instead of white bread, and drink enough water. It is also important to sleep well, to
exercise regularly and to spend time with people who make you happy.

Renewable energy comes from sources that do not run out, such as the sun, the wind and moving water. Unlike coal, oil
and gas, these sources release very little carbon dioxide into the atmosphere. However, the wind does not always blow,
so the energy has to be stored in batteries or shared between different regions.

Dear Mr. Smith, thank you for your application. We were impressed by your experience and would like to invite you to an
interview at our office next Tuesday at 10:30. Please let us know whether this time is convenient for you. We look
forward to meeting you. Best regards, the hiring team.

Once upon a time there was a small fox who lived at the edge of a great forest. Every evening she walked down to the
river to watch the boats go by. One night a boat stopped, and an old man asked her, "Would you like to see the ocean?"
The fox thought about it for a long time. Then she jumped on board.

To make a simple tomato soup, heat two tablespoons of oil in a large pot. Add a chopped onion and cook it until it is
soft. Stir in four cups of chopped tomatoes, a pinch of salt and a little pepper. Let the soup boil gently for twenty
minutes, then mix it until it is smooth. Serve it hot with fresh bread.

Photosynthesis is the process by which green plants use sunlight to make their own food. They take in carbon dioxide
from the air through their leaves and water from the soil through their roots. The plants produce sugar, which gives
them energy, and they release oxygen, which animals and humans need to breathe.

The customer bought a new phone last week and was disappointed with the battery. It lasted only five hours, and the
screen froze twice. She contacted the company, explained the problem and asked for a refund. The support team apologized
and offered to replace the device free of charge.

An algorithm is a step-by-step method for solving a problem. A computer program is a set of instructions written in a
programming language, such as Python or Java, that tells the machine what to do. A function takes one or more arguments,
performs a calculation and returns a value. For example, def add(a, b): return a + b returns the sum of two numbers.

Climate change affects everyone. Rising temperatures melt the ice at the poles, which raises the level of the sea and
threatens cities near the coast. Farmers face longer droughts, and many species lose their habitat. Governments,
businesses and individuals can all help: by using public transportation, by planting trees and by wasting less.

Good communication is the key to a strong team. Listen carefully before you respond, ask open questions, and make sure
that everybody understands the goals of the project. When a conflict occurs, talk about the problem rather than the
person. A manager who gives clear and honest feedback encourages employees to improve.

The main character of the novel is a young woman named Elizabeth, who leaves her village to become a scientist. At first
nobody believes in her, but through hard work and determination she discovers a cure for a dangerous disease. The author
uses simple language and vivid images, and the theme of the story is that courage can change the world.

There are three states of matter that we meet every day: solid, liquid and gas. The atoms of a solid are packed closely
together, those of a liquid can move past each other, and those of a gas fly freely in all directions. When ice is
heated, it melts and becomes water; when water is heated further, it turns into steam.

World history is full of inventions that changed how people live. The printing press made books cheap, the steam engine
moved factories and trains, and electricity brought light into every home. Today the internet connects billions of
people, and artificial intelligence is beginning to change the way we work, learn and create.

Here are five tips for a successful job interview: 1. Research the company in advance. 2. Dress appropriately and
arrive ten minutes early. 3. Prepare examples of your strengths and your achievements. 4. Ask thoughtful questions about
the position. 5. Send a short message afterwards to thank the interviewer for their time.

The doctor told him to rest for a couple of days, to take the medicine twice a day, and to call again if the pain did
not stop. He promised to follow her advice. By Friday he felt much better, so he went back to work, although his friends
had suggested that he stay at home until the following week.

In the United States the president is elected every four years. The government has three branches: the legislative
branch makes the laws, the executive branch carries them out, and the judicial branch decides what they mean. In many
other countries the parliament chooses a prime minister, and a king or a queen has only a ceremonial role.

My favorite place is the small library on the corner of our street. It smells of old paper and coffee, and the chairs
near the window are so comfortable that I could sit there all afternoon. The librarian knows everybody by name. Whenever
I do not know what to read next, she has an interesting suggestion.

A metaphor compares two things by saying that one of them is the other: "Time is a thief." A simile uses the words
"like" or "as": "She was as brave as a lion." Writers use both of them to create pictures in the mind of the reader. An
adjective describes a noun, and an adverb describes a verb, an adjective or another adverb.

If you want to save money, start by writing down everything you spend in a month. Then decide which expenses are
necessary and which ones you could reduce. Set a realistic budget, compare prices before you buy something expensive,
and put a small amount into a savings account as soon as you are paid. It's easier than it sounds, and you'll be proud.

The area of a rectangle is its length multiplied by its width. A rectangle that is 6 meters long and 4 meters wide has
an area of 24 square meters. The perimeter is the total length of all four sides, which is 20 meters. The area of a
circle is equal to pi times the square of its radius, and pi is approximately 3.14.

"I can't find my glasses," said the grandmother. "They're on your head!" laughed the children. She touched her hair,
found the glasses and began to laugh as well. "What would I do without you?" she asked. "You'd buy new ones," they
replied, "and we'd find those, too."

Social media has both advantages and disadvantages. On the one hand, it allows people to stay in touch with friends and
family around the world, to share ideas and to find customers for a small business. On the other hand, it can spread
false information, reduce privacy and make users feel lonely or anxious. It is therefore wise to limit its use.

The quick little train left the station at noon, crossed the long bridge over the valley and climbed slowly into the
mountains. Snow covered the trees on both sides of the track. In the restaurant car a waiter was pouring tea, and
outside the window a group of deer looked up, listened for a moment and ran away into the white forest.

Regular exercise strengthens the heart and the muscles, improves the quality of sleep and reduces the risk of serious
illness such as diabetes and heart disease. Experts recommend at least thirty minutes of activity per day. You do not
have to join an expensive gym: walking, cycling, swimming and dancing are all excellent choices.

Machine learning is a branch of computer science in which a model learns patterns from data instead of following fixed
rules. During training, the model makes a prediction, compares it with the correct answer and adjusts its parameters to
reduce the error. Common applications include image classification, speech recognition, translation and recommendation
systems. The more varied the training data, the better the model usually performs on new examples.

A job description for a software engineer might include the following responsibilities: design and develop web
applications, write clean and efficient code, fix errors reported by users, and work together with designers and product
managers. Required skills: knowledge of at least one programming language, experience with databases, and the ability to
solve problems independently.

Japan is an island nation in East Asia, and Tokyo is its capital. Paris is the capital of France and is famous for the
Eiffel Tower, for its museums and for its cuisine. London lies on the River Thames, New York is the largest city of
America, and the Amazon, in South America, is one of the longest rivers on Earth. The population of China is more than
one billion, and many languages are spoken in India and in Africa.

Marketing is more than advertising. A company first has to understand its target audience: who the customers are, what
they need and how much they are willing to pay. Then it chooses a message, a price and the channels through which the
product is sold, such as shops, websites, email and social media platforms. Finally, it measures the results of the
campaign.

The old clock in the hall had not worked for years. One morning, just as the first light touched the floor, it suddenly
began to tick. Everyone in the house woke up and came downstairs. Nobody could explain it. "Perhaps," whispered the
youngest, "it was only waiting for us to listen."

Democracy means that the people decide, directly or through the representatives whom they elect. It depends on free
elections, on equal rights for all citizens, on independent courts and on a press that may criticize those in power.
Although it is often slow and imperfect, it allows a society to correct its own mistakes without violence.

Roses are red, the evening is blue, the wind in the garden is singing for you. The river runs softly, the stars are
above, and night brings the quiet that dreamers so love. Though winter is coming and summer must end, the morning will
find you, my beautiful friend.

The solar system consists of the sun and everything that moves around it: eight planets, their moons, and countless
asteroids and comets. Mercury is the closest planet to the sun, and Jupiter is the largest. Gravity keeps the planets in
their orbits. Light from the sun takes about eight minutes to travel to the Earth.

Online education has become popular because it is flexible and affordable. Students can watch the lessons whenever they
want, repeat difficult parts and learn at their own pace. At the same time they need discipline, since nobody reminds
them to study, and they may miss the personal contact with teachers and other students. A mixture of both forms is often
the most effective approach.
""".strip().split("\n\n")
]
