"""Common English words by part of speech, most common first, for the tokenizer's sentences."""

THINGS: list[str] = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea kid body
    information back parent face level office door health person art war history party result change morning reason
    research girl guy moment air teacher force order customer product market food plan data user website email
    message list sentence paragraph article text example task answer response summary description instruction letter
    language code function computer software machine network internet phone model image picture video song poem
    character theme plot tree plant animal fish bird dog cat horse flower garden river ocean mountain forest island
    beach field sun moon star planet earth weather rain snow wind storm fire light color colour sound energy heat
    cell atom gas metal oil paper glass stone wood plastic table chair bed window wall floor kitchen road street
    bridge park town village station airport train bus plane ship boat bicycle truck driver doctor nurse farmer
    artist writer scientist engineer manager employee worker lawyer police soldier king queen leader player winner
    author reader speaker baby brother sister son daughter husband wife uncle neighbor stranger guest visitor
    breakfast lunch dinner meal recipe bread butter cheese milk egg meat chicken rice soup salad fruit vegetable
    apple orange sugar salt pepper tea coffee juice wine cup bottle bowl plate knife shirt dress coat shoe hat bag
    box key clock watch ring gift card ticket price cost tax bill bank budget income loan stock interview meeting
    project report test exam lesson class course college university library museum theater church hospital hotel
    restaurant shop store farm factory tool device screen button battery camera engine wheel map sign note page
    chapter title topic subject chart graph figure shape circle square triangle angle equation formula value rate
    ratio percent average total amount size length width height weight speed distance temperature degree inch foot
    mile meter pound dollar second century
""".split()

ABSTRACT: list[str] = """
    education development technology environment information communication organization relationship experience
    knowledge opportunity management production population pollution operation situation solution decision
    discussion attention position condition tradition nation relation action reaction direction collection
    connection construction introduction conclusion description explanation definition application transportation
    generation imagination motivation innovation conversation observation combination competition television
    revolution evolution religion freedom happiness sadness kindness darkness illness business success process
    progress access stress confidence influence difference intelligence science presence absence importance
    performance distance balance chance romance ability responsibility activity community society quality quantity
    reality security identity variety diversity electricity creativity equality safety beauty duty honesty poverty
    agreement argument statement movement treatment improvement achievement payment investment equipment measurement
    advertisement government culture nature future feature structure temperature agriculture literature pressure
    adventure pleasure exercise advice practice service price choice voice justice peace love hope fear anger joy
    trust truth health wealth growth strength death birth youth age stage message language advantage damage image
    storage usage marriage courage leadership friendship ownership membership childhood neighborhood marketing
    training learning meaning feeling building beginning ending reading writing cooking swimming shopping planning
    thinking hearing warning evidence audience sentence patience silence violence climate change energy memory
    history theory industry economy policy strategy democracy philosophy psychology biology chemistry physics
    mathematics politics economics medicine music sport fashion design style taste smell noise sleep dream goal
    skill effort habit behavior effect impact benefit risk danger mistake failure challenge concept principle method
    approach technique purpose aspect element factor source resource material substance mixture component ingredient
    detail version option standard rule right
""".split()

DOINGS: list[str] = """
    have do say get make go know take see come think look want give use find tell ask work seem feel try leave call
    need become put mean keep let begin help talk turn start show hear play run move like live believe hold bring
    happen write provide sit stand lose pay meet include continue set learn change lead understand watch follow stop
    create speak read allow add spend grow open walk win offer remember love consider appear buy wait serve die send
    expect build stay fall cut reach kill remain suggest raise pass sell require report decide pull return explain
    hope develop carry break receive agree support hit produce eat cover catch draw choose cause point listen
    realize place close involve increase improve reduce protect prevent avoid save share teach describe compare
    identify classify generate rewrite edit summarize translate convert calculate determine design organize prepare
    cook bake mix pour boil heat clean wash drive travel visit enjoy relax exercise practice train study discuss
    answer respond reply contain consist depend represent express inspire encourage motivate manage control measure
    analyze evaluate examine discover explore invent introduce replace remove delete insert select sort count
    multiply divide combine connect separate complete finish achieve succeed fail struggle fight attack defend
    escape hide search collect store deliver order charge invest earn borrow owe own belong exist occur affect
    influence contribute participate communicate collaborate celebrate laugh smile cry sing dance dream sleep wake
    climb jump throw kick push drop lift shake touch smell taste promise refuse accept reject apologize forgive
    thank invite welcome greet miss worry fear hate admire respect
""".split()

QUALITIES: list[str] = """
    good new first last long great little own other old right big high different small large next early young
    important few public bad same able human local late hard major better economic strong possible whole free
    military true federal international full special easy clear recent certain personal open red difficult available
    likely short single medical current wrong private past foreign fine common poor natural significant similar hot
    dead central happy serious ready simple left physical general environmental financial blue democratic dark
    various entire close legal religious cold final main green nice huge popular traditional cultural social
    political national global modern ancient digital electronic mechanical chemical scientific technical practical
    creative effective efficient positive negative active native sensitive expensive cheap rich healthy sick dirty
    clean safe dangerous quiet loud bright beautiful wonderful powerful useful helpful successful careful peaceful
    careless endless homeless useless famous nervous curious generous delicious obvious previous comfortable
    reasonable valuable reliable renewable sustainable responsible flexible visible incredible terrible friendly
    lonely lovely lively costly daily weekly fresh dry wet soft sharp smooth rough sweet bitter sour spicy salty
    warm cool deep wide narrow thick thin heavy light tall round flat empty busy lazy crazy angry hungry thirsty
    tired excited interested surprised worried exciting interesting surprising amazing boring challenging growing
    increasing leading missing moving existing primary secondary necessary ordinary temporary virtual visual
    individual actual equal formal normal ideal original complex perfect exact correct direct distinct urgent
    patient intelligent independent excellent silent
""".split()

MANNERS: list[str] = """
    up so out just now how then more also here well only very even back there down still in as too when never really
    most always often usually sometimes again today tomorrow yesterday together quickly slowly easily carefully
    clearly finally recently actually probably simply nearly certainly generally especially currently immediately
    directly completely exactly suddenly quietly loudly happily sadly gently safely properly correctly effectively
    successfully regularly frequently rarely once twice soon later almost perhaps maybe instead however therefore
    otherwise meanwhile additionally furthermore moreover eventually originally naturally personally physically
    rather quite enough away forward ahead outside inside everywhere nowhere alone online
""".split()

# Nouns in THINGS without a plural.
UNCOUNTED: set[str] = set(
    """
    work money information health art history research air food data software music equipment energy heat gas metal oil
    paper glass wood plastic police bread butter cheese milk meat chicken rice soup salad fruit sugar salt pepper tea
    coffee juice wine weather rain snow wind light water power law business
    """.split()
)
# Irregular past tenses of DOINGS that the tasks do not ask for.
OTHER_PASTS: dict[str, str] = dict(
    pair.split("-")
    for pair in """
    have-had do-did put-put let-let set-set cut-cut hit-hit mean-meant become-became understand-understood deal-dealt
    rewrite-rewrote cost-cost fight-fought smell-smelled admit-admitted occur-occurred
    """.split()
)
PARTICIPLES: list[str] = """
    made used been done seen found called known given taken left kept needed told written shown put asked changed
    created based held built brought moved become started lost paid grown developed provided included considered
    required produced improved increased reduced accepted added supported received broken chosen eaten driven spoken
    forgotten thrown drawn worn hidden designed organized described explained published discovered invented
    influenced completed connected limited related involved expected prepared protected affected replaced inspired
""".split()
