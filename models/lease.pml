/*
 * The lease and claim protocol of two nodes and an arbiter; see README.md for what is left out.
 *
 * After the machines of src/kagemusha/protocol: primary.py, standby.py, lease.py, election.py. Every action is one
 * atomic step of one side. Nobody is obliged to take a step, so a process that is frozen, an arbiter that does not
 * answer and a message that is late are all the same here: time passes and the step is not taken. Only time obeys: a
 * lease that runs out stops the gate in the kernel, whatever the processes do.
 *
 * Weakened protocols, each with a counterexample: ACK_EARLY, RELEASE_AT_SEAL, NO_WAIT, NO_DRIFT, IGNORE_TERM,
 * RENEW_AT_RECEIPT, OBEY_OLD_CLAIM, ACCEPT_WHILE_CLAIMING, RECORD_BEFORE_KILL, HAND_OVER_BEFORE_CLOSE,
 * HAND_OVER_UNRECORDED, BOOT_UNASKED, BOOT_BEYOND_TRIED, BOOT_AT_ONCE. REACH asks for a takeover with re-protection instead.
 */

#ifndef MAXTERM
#define MAXTERM 4       /* terms beyond are not claimed, nor agreed on */
#endif
#ifndef MAXEPOCH
#define MAXEPOCH 3      /* checkpoints of one lineage of the guest */
#endif
#ifndef CRASHES
#define CRASHES 1       /* hosts, guests and workers that die, together */
#endif
#ifndef BREAKS
#define BREAKS 2        /* links that break */
#endif

/* In one tick of real time a clock advances by SLOW or by FAST: a drift of 20 % about the middle. */
#define SLOW 2
#define FAST 3
#define LEASE 6
#ifdef NO_DRIFT
#define SILENCE LEASE
#else
#define SILENCE (LEASE * FAST / SLOW)
#endif

/* Roles; FENCED: its guest is about to be killed. */
#define OFF 0
#define ALONE 1
#define HOLDING 2
#define SESSION 3
#define FENCED 4
#define WAITING 5
#define SYNCING 6
#define PROTECTING 7
#define CLAIMING 8
#define TAKING_OVER 9
#define BOOTING 10

/* Messages: kind, term or epoch, tried or superseded, first epoch. */
#define HELLO 1
#define CHECKPOINT 2
#define HAND_OVER 3
#define STAND_DOWN 4
#define WELCOME 5
#define REFUSED 6
#define ACK 7
#define GOODBYE 8

#define NO_LINK 0
#define OPEN 1
#define BROKEN 2

#define NOBODY 0
#define HOLDER(n) (1 + (n) + 2 * instance[n])   /* a guest's identity at the arbiter: the host, and which guest of it */
#define BIT(n) (1 << instance[n])
#define MAX(x, y) ((x) > (y) -> (x) : (y))
#define PEER (1 - n)

/* --- durable, by node --- */
byte term[2], tried[2], agreed[2];
bit own[2];

/* --- of the processes --- */
byte role[2];
byte instance[2];       /* which guest of this host */
byte epoch[2];          /* of the guest, as primary */
byte in_flight[2];
byte fenced_by[2];      /* the term that ends this guest */
byte committed[2];      /* as standby */
bit promised[2], claiming[2], covered[2];
byte accepted[2];       /* ACCEPT_WHILE_CLAIMING: the claim that is still open; ACK_EARLY: acknowledged, not complete */
byte older[2];          /* an older claim, its answer outstanding (OBEY_OLD_CLAIM) */

/* --- guest, gate and clocks --- */
bit guest[2], holding[2];
byte lease[2], silence[2];

/* --- the link: at most one; the dialler is the primary --- */
byte link;
bit dialler;
bit attached[2];        /* this side believes in the link */
byte beat, echo;        /* a heartbeat on its way, and its echo: what is left of the lease that it gives */
chan to_standby = [3] of { byte, byte, byte, byte };
chan to_primary = [3] of { byte, byte };

/* --- the arbiter --- */
byte given[MAXTERM + 1];
byte asked_a[MAXTERM + 1], asked_b[MAXTERM + 1];  /* claims on their way, by which guests */

/* --- what is only watched --- */
byte seen[2];           /* by the guest that runs, or ran, here: the newest epoch of which output has left */
byte safe[2];           /* and the newest that a standby has committed */
bit taken_over;
byte crashes, breaks;
byte x, y, z, w, best, base;

#ifdef HAND_OVER_BEFORE_CLOSE
bit draining[2];        /* the guest is dead, but what was released of its output is still on its way out of the gate */
#define CAN_SEND(n) (guest[n] && (!holding[n] || lease[n] > 0) || draining[n] && lease[n] > 0)
#else
#define CAN_SEND(n) (guest[n] && (!holding[n] || lease[n] > 0))
#endif
#define UNLEASED(n) (guest[n] && !holding[n])
#define GIVEN_TO_ME(t) (given[t] == HOLDER(n))
#ifdef IGNORE_TERM
#define HEARS_BEATS(n) (role[n] == SYNCING || role[n] == PROTECTING || role[n] == TAKING_OVER || role[n] == ALONE)
#else
#define HEARS_BEATS(n) (role[n] == SYNCING || role[n] == PROTECTING)
#endif
#ifdef NO_WAIT
#define WAITED(n) true
#else
#define WAITED(n) (silence[n] == 0)
#endif
#ifdef BOOT_AT_ONCE
#define BOOT_WAITED(n) true
#else
#define BOOT_WAITED(n) WAITED(n)
#endif
#define CHECK \
	assert(!(CAN_SEND(0) && CAN_SEND(1))); \
	assert(!(role[0] == FENCED && UNLEASED(0)) && !(role[1] == FENCED && UNLEASED(1)))

inline ask(t) {
	if
	:: n == 0 -> asked_a[t] = asked_a[t] | BIT(n)
	:: else -> asked_b[t] = asked_b[t] | BIT(n)
	fi
}

inline hang_up() {
	attached[n] = 0;
	if
	:: attached[PEER] && link == OPEN -> link = BROKEN
	:: !attached[PEER] -> link = NO_LINK; clear_link()
	:: else -> skip
	fi
}

inline clear_link() {
	do
	:: len(to_standby) > 0 -> to_standby?_,_,_,_
	:: len(to_primary) > 0 -> to_primary?_,_
	:: else -> break
	od;
	beat = 0; echo = 0
}

inline tell_standby(kind_, term_, tried_, first_) {
	if
	:: link == OPEN && len(to_standby) < 3 -> to_standby!kind_,term_,tried_,first_
	:: else -> skip
	fi
}

inline tell_primary(kind_, word_) {
	if
	:: link == OPEN && len(to_primary) < 3 -> to_primary!kind_,word_
	:: else -> skip
	fi
}

inline drop_claim() {
#ifdef OBEY_OLD_CLAIM
	if :: claiming[n] -> older[n] = tried[n] :: else -> skip fi;
#endif
	claiming[n] = 0
}

/* primary._without_standby */
inline without_standby() {
	in_flight[n] = 0; covered[n] = 0;
	if
	:: promised[n] ->
		role[n] = HOLDING;
		x = (tried[n] > term[n] -> tried[n] : term[n] + 1);
		if
		:: x <= MAXTERM -> tried[n] = x; claiming[n] = 1; ask(x)
		:: else -> skip
		fi;
		x = 0
	:: else ->
		role[n] = ALONE; holding[n] = 0; drop_claim(); lease[n] = 0;
		seen[n] = epoch[n]                                      /* PassOutput */
	fi
}

inline forget_checkpoint() {
	committed[n] = 0; silence[n] = 0; role[n] = WAITING; accepted[n] = 0
}

/* primary._superseded. The guest is killed before the term is recorded: a successor of this worker that finds the
 * guest alive must still claim the term that is lost. */
inline record_fence(t) {
	term[n] = t; own[n] = 0; tried[n] = MAX(tried[n], t)
}

inline fence(t) {
	role[n] = FENCED; fenced_by[n] = t;
#ifdef RECORD_BEFORE_KILL
	record_fence(t);
#endif
	claiming[n] = 0; promised[n] = 0; in_flight[n] = 0; covered[n] = 0
}

inline be_standby() {
	guest[n] = 0; holding[n] = 0; lease[n] = 0; epoch[n] = 0; promised[n] = 0; claiming[n] = 0; older[n] = 0;
	in_flight[n] = 0; covered[n] = 0; fenced_by[n] = 0;
	instance[n] = (instance[n] < 3 -> instance[n] + 1 : 3);
	forget_checkpoint()
}

/* standby._take_over_in */
inline take_over(t) {
	role[n] = TAKING_OVER; term[n] = t; tried[n] = t; own[n] = 1; accepted[n] = 0
}

inline release(e) {
	assert(e <= safe[n]);                                      /* I1: the standby has committed it */
	if :: lease[n] > 0 -> seen[n] = MAX(seen[n], e) :: else -> skip fi
}

proctype node(bit n) {
	do
	/* ---------------- primary ---------------- */
	:: atomic { (role[n] == ALONE || role[n] == HOLDING) && !attached[n] && role[PEER] != OFF && link != OPEN ->
		clear_link(); link = OPEN; dialler = n; attached[n] = 1;
		if
		:: attached[PEER] && (role[PEER] == SESSION || role[PEER] == ALONE || role[PEER] == HOLDING) -> link = BROKEN
		:: else -> to_standby!HELLO,term[n],tried[n],epoch[n]
		fi; x = 0 }
	:: atomic { attached[n] && dialler == n && (role[n] == ALONE || role[n] == HOLDING) && to_primary?[WELCOME,_] ->
		to_primary?WELCOME,x;
		if
		:: x < MAX(term[n], tried[n]) -> hang_up()
		:: else ->
			if :: x > term[n] -> ask(x) :: else -> skip fi;  /* NoteTerm */
			term[n] = x; tried[n] = x; own[n] = 1;
			drop_claim(); promised[n] = 0; role[n] = SESSION; covered[n] = 0; in_flight[n] = 0
		fi; x = 0; CHECK }
	:: atomic { attached[n] && dialler == n && (role[n] == ALONE || role[n] == HOLDING) && to_primary?[REFUSED,_] ->
		to_primary?REFUSED,x; hang_up();
		if
		:: x == 0 || x <= term[n] || (claiming[n] && x <= tried[n]) -> skip
		:: else -> fence(x)
		fi; x = 0; CHECK }
	/* A checkpoint: pause, hold, seal, resume, ship. */
	:: atomic { role[n] == SESSION && in_flight[n] < 1 && epoch[n] < MAXEPOCH ->
		if
		:: !holding[n] -> holding[n] = 1; lease[n] = LEASE; seen[n] = epoch[n]
		:: else -> skip
		fi;
#ifdef RELEASE_AT_SEAL
		if :: lease[n] > 0 -> seen[n] = MAX(seen[n], epoch[n]) :: else -> skip fi;
#endif
		tell_standby(CHECKPOINT, epoch[n], 0, 0);
		epoch[n] = epoch[n] + 1; in_flight[n] = in_flight[n] + 1; CHECK }
	:: atomic { role[n] == SESSION && attached[n] && to_primary?[ACK,_] ->
		to_primary?ACK,x;
		in_flight[n] = in_flight[n] - 1; promised[n] = 1; covered[n] = 1;
		release(x); x = 0; CHECK }
	:: atomic { role[n] == SESSION && attached[n] && dialler == n && link == OPEN && beat == 0 -> beat = LEASE }
	:: atomic { role[n] == SESSION && attached[n] && dialler == n && echo > 0 && holding[n] ->
#ifdef RENEW_AT_RECEIPT
		lease[n] = LEASE;
#else
		lease[n] = MAX(lease[n], echo);
#endif
		echo = 0; CHECK }
	:: atomic { role[n] == SESSION && attached[n] && to_primary?[GOODBYE,_] ->
		hang_up(); promised[n] = 0; without_standby(); x = 0; CHECK }
	:: atomic { attached[n] && dialler == n && link == BROKEN && (role[n] == ALONE || role[n] == HOLDING) -> hang_up() }
	:: atomic { attached[n] && (role[n] == SESSION) && (dialler != n || link == BROKEN) ->
		hang_up(); promised[n] = promised[n] || in_flight[n] > 0; without_standby(); x = 0; CHECK }
	/* The arbiter's answer. */
	:: atomic { role[n] == HOLDING && claiming[n] && given[tried[n]] != NOBODY ->
		if
		:: GIVEN_TO_ME(tried[n]) ->
			term[n] = tried[n]; own[n] = 1; claiming[n] = 0; promised[n] = 0; without_standby()
		:: else -> x = tried[n]; fence(x); if :: attached[n] -> hang_up() :: else -> skip fi
		fi; x = 0; CHECK }
#ifdef OBEY_OLD_CLAIM
	:: atomic { role[n] == HOLDING && older[n] && GIVEN_TO_ME(older[n]) ->
		older[n] = 0; promised[n] = 0; term[n] = tried[n]; own[n] = 1; without_standby(); x = 0; CHECK }
#endif
	:: atomic { role[n] == FENCED && guest[n] ->
		record_fence(fenced_by[n]); be_standby(); if :: attached[n] -> hang_up() :: else -> skip fi }
	/* The guest dies, or is stopped for a switchover: the standby takes over at once, so nothing may leave any more. */
	:: atomic { role[n] == SESSION && crashes < CRASHES && (covered[n] || in_flight[n] > 0) &&
		    MAX(term[n], tried[n]) < MAXTERM ->
		crashes = crashes + 1;
#ifndef HAND_OVER_UNRECORDED
		term[n] = MAX(term[n], tried[n]) + 1; tried[n] = term[n]; own[n] = 0;
#endif
		tell_standby(HAND_OVER, 0, 0, 0); hang_up();
#ifdef HAND_OVER_BEFORE_CLOSE
		x = lease[n]; be_standby(); lease[n] = x; draining[n] = 1; x = 0
#else
		be_standby()
#endif
		}

	/* ---------------- standby ---------------- */
	:: atomic { dialler != n && (role[n] >= WAITING && role[n] <= PROTECTING) && to_standby?[HELLO,_,_,_] ->
		to_standby?HELLO,x,y,z; attached[n] = 1;
		if
		:: x < term[n] -> tell_primary(REFUSED, term[n]); hang_up()
		:: x == term[n] && z <= committed[n] -> tell_primary(REFUSED, 0); hang_up()
		:: else ->
			w = MAX(y, tried[n]); x = MAX(x, term[n]);
			y = (w <= x -> x : w + 1);
			if
			:: y > MAXTERM -> hang_up()
			:: else ->
				if :: x > term[n] -> term[n] = x; own[n] = 0 :: else -> skip fi;
				tried[n] = MAX(tried[n], y); agreed[n] = y; forget_checkpoint();
				role[n] = SYNCING; tell_primary(WELCOME, y)
			fi
		fi; x = 0; y = 0; z = 0; w = 0 }
	:: atomic { dialler != n && (role[n] == CLAIMING || role[n] == TAKING_OVER) && to_standby?[HELLO,_,_,_] ->
		to_standby?HELLO,x,y,z; attached[n] = 1;
#ifdef ACCEPT_WHILE_CLAIMING
		if
		:: role[n] == CLAIMING && tried[n] < MAXTERM ->
			accepted[n] = tried[n]; tried[n] = MAX(y, tried[n]) + 1; agreed[n] = tried[n];
			committed[n] = 0; role[n] = SYNCING; tell_primary(WELCOME, tried[n])
		:: else -> x = (term[n] > x -> term[n] : 0); tell_primary(REFUSED, x); hang_up()
		fi;
#else
#ifdef IGNORE_TERM
		if
		:: role[n] == TAKING_OVER -> tell_primary(WELCOME, term[n])
		:: else -> x = (term[n] > x -> term[n] : 0); tell_primary(REFUSED, x); hang_up()
		fi;
#else
		x = (term[n] > x -> term[n] : 0); tell_primary(REFUSED, x); hang_up();
#endif
#endif
		x = 0; y = 0; z = 0 }
	/* Nobody listens here. */
	:: atomic { dialler != n && link == OPEN && (role[n] < WAITING || role[n] == BOOTING) && to_standby?[HELLO,_,_,_] ->
		link = BROKEN; clear_link() }
#ifdef ACK_EARLY
	:: atomic { (role[n] == SYNCING || role[n] == PROTECTING) && attached[n] && link == OPEN && dialler != n &&
		    len(to_primary) < 3 && !accepted[n] && to_standby?[CHECKPOINT,_,_,_] ->
		to_standby?<_,x,_,_>; accepted[n] = 1; safe[PEER] = MAX(safe[PEER], x); to_primary!ACK,x; x = 0 }
#endif
	:: atomic { (role[n] == SYNCING || role[n] == PROTECTING) && attached[n] && dialler != n &&
		    to_standby?[CHECKPOINT,_,_,_] ->
		to_standby?CHECKPOINT,x,_,_;
		if :: tried[n] > term[n] -> term[n] = tried[n]; own[n] = 0 :: else -> skip fi;
		committed[n] = x; role[n] = PROTECTING; silence[n] = SILENCE;
#ifdef ACK_EARLY
		if :: accepted[n] -> skip :: else -> tell_primary(ACK, x) fi; accepted[n] = 0;
#else
		safe[PEER] = MAX(safe[PEER], x); tell_primary(ACK, x);
#endif
		x = 0;
#ifdef REACH
		assert(!taken_over);
#endif
		}
	:: atomic { HEARS_BEATS(n) && attached[n] && dialler != n && beat > 0 && echo == 0 ->
		if :: role[n] == PROTECTING -> silence[n] = SILENCE :: else -> skip fi;
		if :: link == OPEN -> echo = beat :: else -> skip fi;
		beat = 0 }
	:: atomic { (role[n] == SYNCING || role[n] == PROTECTING) && attached[n] && dialler != n &&
		    to_standby?[HAND_OVER,_,_,_] ->
		to_standby?HAND_OVER,_,_,_; hang_up();
		if
		:: role[n] == PROTECTING && MAX(term[n], tried[n]) < MAXTERM -> x = MAX(term[n], tried[n]) + 1; take_over(x); ask(x); silence[n] = 0
		:: else -> forget_checkpoint()
		fi; x = 0 }
	:: atomic { attached[n] && (role[n] >= SYNCING && role[n] <= PROTECTING) && (dialler == n || link == BROKEN) ->
		hang_up();
		if :: role[n] == SYNCING -> forget_checkpoint() :: else -> skip fi }
	/* Taken for dead; whether too early matters to nobody but who serves. */
	:: atomic { role[n] == PROTECTING && MAX(term[n], tried[n]) < MAXTERM ->
		if :: attached[n] -> hang_up() :: else -> skip fi;
		tried[n] = MAX(term[n], tried[n]) + 1; ask(tried[n]); role[n] = CLAIMING }
	:: atomic { role[n] == CLAIMING && given[tried[n]] != NOBODY ->
		if
		:: GIVEN_TO_ME(tried[n]) -> x = tried[n]; take_over(x)
		:: else -> term[n] = tried[n]; own[n] = 0; forget_checkpoint()
		fi; x = 0 }
#ifdef ACCEPT_WHILE_CLAIMING
	:: atomic { accepted[n] && (role[n] == SYNCING || role[n] == PROTECTING) && GIVEN_TO_ME(accepted[n]) ->
		if :: attached[n] -> hang_up() :: else -> skip fi;
		x = tried[n]; take_over(x); x = 0 }
#endif
	/* The operator stops this standby: it promises not to take over. */
	:: atomic { (role[n] == SYNCING || role[n] == PROTECTING) && attached[n] && dialler != n && crashes < CRASHES ->
		crashes = crashes + 1; tell_primary(GOODBYE, 0); hang_up(); be_standby(); role[n] = OFF }
	/* The guest may run before, but is not heard. */
	:: atomic { role[n] == TAKING_OVER && WAITED(n) ->
		silence[n] = 0; guest[n] = 1; holding[n] = 0; epoch[n] = committed[n] + 1; taken_over = 1; role[n] = ALONE; promised[n] = 0;
		assert(seen[PEER] <= committed[n]);                /* nothing that was seen is taken back */
		seen[n] = epoch[n]; safe[n] = 0; committed[n] = 0;
#ifndef IGNORE_TERM
		if :: attached[n] -> hang_up() :: else -> skip fi;
#endif
		CHECK }

	/* ---------------- start ---------------- */
	/* The worker died, its guest runs on: in doubt. */
	:: atomic { role[n] == OFF && guest[n] ->
		if :: !holding[n] -> holding[n] = 1; lease[n] = 0 :: else -> skip fi;
		promised[n] = 1; without_standby(); x = 0; CHECK }
	/* election.term_to_claim; a node that waits without a session asks again now and then. */
	:: atomic { (role[n] == OFF || role[n] == WAITING && !attached[n]) && !guest[n] ->
#ifdef BOOT_UNASKED
		best = 0; base = MAXTERM;
		if
		:: role[n] == OFF && own[n] ->
			guest[n] = 1; holding[n] = 0; epoch[n] = 1; seen[n] = 1; safe[n] = 0; role[n] = ALONE; CHECK
		:: else -> role[n] = WAITING
		fi;
#else
		best = MAXTERM;
		do :: best > 0 && given[best] == NOBODY -> best = best - 1 :: else -> break od;
		base = (given[best] != NOBODY && (given[best] - 1) % 2 == n -> best : 0);
		base = (own[n] -> MAX(base, term[n]) : base);
		if
		:: base < MAX(MAX(best, term[n]), MAX(agreed[n], 1)) -> base = MAXTERM
#ifdef BOOT_BEYOND_TRIED
		:: else -> base = MAX(base, tried[n])
#else
		:: else -> skip
#endif
		fi;
		if
		:: base < MAXTERM -> tried[n] = MAX(tried[n], base + 1); epoch[n] = base + 1; role[n] = BOOTING; ask(base + 1);
			/* Whoever claimed the term before this one may have died before the lease was over that it waited for. */
			silence[n] = SILENCE
		:: else -> role[n] = WAITING
		fi;
#endif
		best = 0; base = 0 }
	:: atomic { role[n] == BOOTING && given[epoch[n]] != NOBODY && BOOT_WAITED(n) ->
		silence[n] = 0;
		if
		:: GIVEN_TO_ME(epoch[n]) ->
			term[n] = epoch[n]; own[n] = 1; guest[n] = 1; holding[n] = 0; epoch[n] = 1; seen[n] = 1; safe[n] = 0; role[n] = ALONE
		:: else -> role[n] = WAITING; epoch[n] = 0
		fi; CHECK }

	/* ---------------- faults ---------------- */
	:: atomic { role[n] != OFF && crashes < CRASHES && instance[n] < 3 -> /* the host */
		crashes = crashes + 1; be_standby(); role[n] = OFF;
		if :: attached[n] -> hang_up() :: else -> skip fi }
	:: atomic { guest[n] && role[n] != OFF && crashes < CRASHES -> /* the worker */
		crashes = crashes + 1; role[n] = OFF; claiming[n] = 0; in_flight[n] = 0; covered[n] = 0; promised[n] = 0;
		older[n] = 0; fenced_by[n] = 0;
		if :: attached[n] -> hang_up() :: else -> skip fi }
	od
}

/* One of the claims on their way; the arbiter gives a term once. */
#define APPLY(asked, k) \
	if \
	:: asked[t] & 1 -> w = 0 \
	:: asked[t] & 2 -> w = 1 \
	:: asked[t] & 4 -> w = 2 \
	:: asked[t] & 8 -> w = 3 \
	fi; \
	asked[t] = asked[t] & (15 - (1 << w)); \
	if :: given[t] == NOBODY -> given[t] = 1 + k + 2 * w :: else -> skip fi; \
	w = 0

#define PASS(clock, by) clock = (clock > by -> clock - by : 0)

inline run_clock(k, by) {
	PASS(lease[k], by);
	PASS(silence[k], by);
#ifndef RENEW_AT_RECEIPT
	if :: dialler == k -> PASS(beat, by); PASS(echo, by) :: else -> skip fi
#endif
}

proctype world() {
	byte t;
	do
	:: atomic { lease[0] + lease[1] + silence[0] + silence[1] > 0 -> /* a tick of real time */
		if :: run_clock(0, SLOW) :: run_clock(0, FAST) fi;
		if :: run_clock(1, SLOW) :: run_clock(1, FAST) fi }
	:: atomic { t = 1;
		do :: t < MAXTERM -> t = t + 1 :: break od;
		if
		:: asked_a[t] -> APPLY(asked_a, 0)
		:: asked_b[t] -> APPLY(asked_b, 1)
		:: else -> skip
		fi; t = 0 }
	:: atomic { link == OPEN && breaks < BREAKS ->
		breaks = breaks + 1; link = BROKEN;
		if
		:: clear_link()                                      /* what was on its way is lost */
		:: skip                                              /* or still arrives */
		fi }
	od
}

init {
	atomic {
		term[0] = 1; tried[0] = 1; own[0] = 1; role[0] = ALONE; guest[0] = 1; epoch[0] = 1; seen[0] = 1;
		given[1] = 1;
		role[1] = WAITING;
		run node(0); run node(1); run world()
	}
}
