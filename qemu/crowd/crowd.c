/*
 * Ten thousand tasks that sleep: processes called crowd-P, each with threads called crowd-P-T, that wait in turns for
 * a signal, a timer, a byte from a pipe and a futex.
 *
 *   crowd PROCESSES THREADS
 */
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>

#include "../programs/planted.h"

enum { WAYS = 4 };

static int pipe_ends[2];
static int process;

static void sleep_in(int way)
{
	struct timespec long_time = { .tv_sec = 1000000 };
	static int word;
	char byte;

	switch (way) {
	case 0:
		pause();
		break;
	case 1:
		nanosleep(&long_time, NULL);
		break;
	case 2:
		(void)!read(pipe_ends[0], &byte, 1);
		break;
	default:
		syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
	}
}

static void *thread(void *argument)
{
	long number = (long)argument;
	char name[16];

	snprintf(name, sizeof(name), "crowd-%d-%ld", process, number);
	name_thread(name);
	sleep_in(number % WAYS);
	return NULL;
}

static void be_a_process(int threads, int ready)
{
	pthread_attr_t small;
	pthread_t id;
	char name[16];

	snprintf(name, sizeof(name), "crowd-%d", process);
	name_thread(name);
	CHECK(pthread_attr_init(&small) == 0);
	CHECK(pthread_attr_setstacksize(&small, 1 << 16) == 0);
	for (long number = 1; number < threads; number++)
		CHECK(pthread_create(&id, &small, thread, (void *)number) == 0);
	CHECK(write(ready, "", 1) == 1);
	sleep_in(process % WAYS);
}

int main(int argc, char **argv)
{
	int processes = argc == 3 ? atoi(argv[1]) : 0, threads = argc == 3 ? atoi(argv[2]) : 0;
	int ready[2];
	char byte;

	if (processes <= 0 || threads <= 0) {
		fprintf(stderr, "usage: crowd PROCESSES THREADS\n");
		return 2;
	}
	CHECK(pipe(pipe_ends) == 0 && pipe(ready) == 0);
	for (process = 0; process < processes; process++) {
		pid_t child = fork();

		CHECK(child >= 0);
		if (child == 0) {
			be_a_process(threads, ready[1]);
			return 0;
		}
		/* One after the other: a thousand at once would take turns on the CPUs for minutes. */
		CHECK(read(ready[0], &byte, 1) == 1);
	}
	printf("processes=%d\nthreads=%d\n", processes, threads);
	planted();
	pause();
}
