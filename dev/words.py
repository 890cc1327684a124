"""Word lists of the tasks: categories, opposites, plurals, past tenses, and the words of scenes."""

CATEGORIES: dict[str, list[str]] = {
    "animal": "dog cat horse cow sheep goat lion tiger bear wolf fox rabbit".split(),
    "bird": "eagle owl robin parrot duck goose swan hawk crow pigeon penguin sparrow".split(),
    "fruit": "apple banana pear peach plum grape lemon mango cherry melon fig lime".split(),
    "vegetable": "carrot onion potato cabbage pea bean spinach celery lettuce turnip leek radish".split(),
    "tool": "hammer saw drill wrench shovel rake chisel axe spade screwdriver file clamp".split(),
    "vehicle": "car bus train truck bicycle boat ship plane tram van ferry tractor".split(),
    "clothing": "shirt coat hat scarf glove sock shoe skirt dress jacket sweater boot".split(),
    "furniture": "table chair sofa desk bed shelf bench stool cupboard wardrobe bookcase armchair".split(),
    "instrument": "piano violin guitar drum flute trumpet harp cello clarinet organ banjo trombone".split(),
    "job": "teacher doctor nurse farmer baker pilot lawyer plumber painter tailor sailor judge".split(),
}

# No word is in two pairs, so every word has one answer.
_OPPOSITES = """
    hot-cold big-small tall-short fast-slow old-new happy-sad up-down left-right open-closed day-night light-dark
    hard-soft wet-dry full-empty rich-poor strong-weak early-late high-low near-far loud-quiet clean-dirty thick-thin
    wide-narrow deep-shallow true-false win-lose buy-sell give-take push-pull start-finish come-go in-out above-below
    before-after first-last always-never more-less many-few inside-outside top-bottom front-back north-south east-west
    love-hate friend-enemy war-peace question-answer sharp-blunt smooth-rough sweet-bitter safe-dangerous simple-complex
    easy-difficult polite-rude cheap-expensive alive-dead asleep-awake begin-end summer-winter arrive-leave
    accept-refuse laugh-cry enter-exit lend-borrow teach-learn remember-forget float-sink build-destroy attack-defend
    ancient-modern guilty-innocent public-private healthy-sick careful-careless useful-useless possible-impossible
    lucky-unlucky fair-unfair male-female black-white increase-decrease success-failure maximum-minimum victory-defeat
    positive-negative
"""

_IRREGULAR_PLURALS = """
    man-men woman-women child-children foot-feet tooth-teeth goose-geese mouse-mice person-people ox-oxen sheep-sheep
    fish-fish deer-deer knife-knives wife-wives life-lives leaf-leaves wolf-wolves shelf-shelves half-halves
    loaf-loaves thief-thieves potato-potatoes tomato-tomatoes hero-heroes
"""
_REGULAR_PLURALS = """
    dog cat horse cow tiger bear rabbit eagle parrot duck hawk apple banana pear plum lemon carrot onion bean hammer
    drill car train truck boat ship plane shirt coat hat scarf sock shoe table chair sofa desk bed piano guitar drum
    teacher doctor nurse farmer pilot river lake road street house garden window door wall book pencil letter bridge
    flower tree cloud star stone island bottle cup spoon plate king queen friend
    box fox bus dress glass class bench branch church watch wish dish brush beach lunch match kiss tax
    city baby lady party story country family puppy cherry berry army body fly spy penny
    boy toy day key monkey donkey valley turkey tray
"""

_IRREGULAR_PASTS = """
    go-went see-saw take-took give-gave come-came make-made find-found know-knew think-thought buy-bought
    bring-brought catch-caught teach-taught tell-told sell-sold run-ran sing-sang swim-swam begin-began drink-drank
    write-wrote drive-drove ride-rode rise-rose break-broke speak-spoke choose-chose freeze-froze steal-stole wake-woke
    forget-forgot get-got hold-held keep-kept sleep-slept feel-felt leave-left lose-lost build-built send-sent
    spend-spent lend-lent meet-met sit-sat stand-stood win-won eat-ate fall-fell fly-flew grow-grew throw-threw
    draw-drew wear-wore hear-heard say-said pay-paid lead-led feed-fed dig-dug hide-hid shake-shook ring-rang
"""
_REGULAR_PASTS = """
    walk talk play jump call ask help look work open clean cook laugh paint want wait visit start finish enjoy stay turn
    pick fill kick cross explain remember wash watch push pull pass climb count listen answer learn follow return
    close move love like live use hope smile dance bake change arrive save
    carry cry try study hurry marry copy worry
    stop plan drop clap hug shop
"""


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("-") for pair in text.split())


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _past(verb: str) -> str:
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    if verb in {"stop", "plan", "drop", "clap", "hug", "shop"}:
        return verb + verb[-1] + "ed"
    return verb + "ed"


OPPOSITES = _pairs(_OPPOSITES) | {b: a for a, b in _pairs(_OPPOSITES).items()}
PLURALS = _pairs(_IRREGULAR_PLURALS) | {noun: _plural(noun) for noun in _REGULAR_PLURALS.split()}
PASTS = _pairs(_IRREGULAR_PASTS) | {verb: _past(verb) for verb in _REGULAR_PASTS.split()}

# Words to spell, to capitalize and to search for letters: three to six letters, all common.
SHORT_WORDS: list[str] = """
    river stone cloud apple bread chair table house green light water horse mouse plant train paper music dream night
    clock sugar lemon tiger zebra beach ocean field storm snow rain wind fire moon star tree leaf bird fish frog bear
    lion wolf duck goat lamp door wall roof road boat ship coat shoe ring gold silver copper glass plate spoon knife
    fork bowl milk salt rice soup cake honey olive grape peach melon onion carrot potato garden forest desert island
    valley bridge castle market school office window mirror candle pillow blanket basket bottle button pocket jacket
    hammer ladder engine wheel rocket planet summer winter spring autumn friend doctor farmer baker king queen child
    sister uncle cousin heart hand foot nose ear arm dog cat pig hen bus car van map pen box cup key jam egg ant bee sun
""".split()

NAMES: list[str] = """
    Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor Alice Peter
    Lucy Tom Nina Oscar Ruth Simon Vera Walter Amir Chen Fatima Diego Priya Yuki Omar Sofia Ivan Leila
""".split()
COLOURS: list[str] = "red blue green yellow black white brown purple orange pink".split()
OBJECTS: list[str] = """
    lamp rope basket ladder bottle book letter box chair clock coat cup drum key kite map mirror pencil pillow plate
    radio ring shovel spoon umbrella bag blanket brush bucket candle hat hammer jacket knife notebook parcel picture
    scarf shoe toy vase wallet
""".split()
PLACES: list[str] = """
    garden kitchen park station library market school office forest beach bridge castle church farm field harbour
    hospital hotel island lake mountain museum river road shop street theatre tower valley village
""".split()
ACTIONS: list[str] = """
    carried found sold painted washed moved dropped cleaned borrowed lost hid bought opened repaired saw wrapped kept
    photographed forgot wanted
""".split()
SUBJECTS: list[str] = """
    we they you I nobody everyone somebody people children visitors students neighbours farmers pilots friends strangers
""".split()
OPENERS: list[str] = """
    Yesterday Today Suddenly Later Quietly Finally Sometimes Often Once Slowly Happily Tonight Usually Perhaps Luckily
""".split()
ADJECTIVES: list[str] = """
    old new small large heavy little broken dusty strange lovely cheap expensive wooden round empty clean beautiful
    famous
""".split()

DAYS: list[str] = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS: list[str] = "January February March April May June July August September October November December".split()
ONES: list[str] = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)
TENS: list[str] = "twenty thirty forty fifty sixty seventy eighty ninety".split()
