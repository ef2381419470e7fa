/*
 * One process, eight named threads, each asleep in another system call. The
 * order of `waits` is the number in the thread's name.
 */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

#include "planted.h"

static pthread_mutex_t held = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t condition_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;

static void wait_nanosleep(void)
{
	struct timespec long_time = { .tv_sec = 1000000 };

	nanosleep(&long_time, NULL);
}

static void wait_condition(void)
{
	pthread_mutex_lock(&condition_mutex);
	pthread_cond_wait(&never, &condition_mutex);
}

static void wait_mutex(void)
{
	pthread_mutex_lock(&held);
}

static void wait_pipe(void)
{
	int ends[2];
	char byte;

	CHECK(pipe(ends) == 0);
	(void)!read(ends[0], &byte, 1);
}

static void wait_poll(void)
{
	int ends[2];

	CHECK(pipe(ends) == 0);
	poll(&(struct pollfd){ .fd = ends[0], .events = POLLIN }, 1, -1);
}

static void wait_epoll(void)
{
	struct epoll_event event;

	epoll_wait(epoll_create1(0), &event, 1, -1);
}

static void wait_accept(void)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX, .sun_path = "/run/kstub.sock" };
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);

	CHECK(bind(listener, (struct sockaddr *)&name, sizeof(name)) == 0);
	CHECK(listen(listener, 1) == 0);
	accept(listener, NULL, NULL);
}

static void wait_signal(void)
{
	pause();
}

static const struct {
	const char *name;
	void (*wait)(void);
} waits[] = {
	{ "nanosleep", wait_nanosleep }, { "futex-condition", wait_condition },
	{ "futex-mutex", wait_mutex },   { "pipe-read", wait_pipe },
	{ "poll", wait_poll },           { "epoll", wait_epoll },
	{ "unix-accept", wait_accept },  { "pause", wait_signal },
};
#define THREADS (sizeof(waits) / sizeof(waits[0]))

static void *sleeper(void *argument)
{
	size_t i = (size_t)argument;
	char name[16];

	snprintf(name, sizeof(name), "kstub-thr-%zu", i);
	name_thread(name);
	printf("thread=%ld comm=%s asleep=%s\n", syscall(SYS_gettid), name, waits[i].name);
	fflush(stdout);
	waits[i].wait();
	return NULL;
}

int main(void)
{
	pthread_t threads[THREADS];

	name_thread("kstub-threads");
	printf("pid=%d\ncomm=kstub-threads\n", getpid());
	pthread_mutex_lock(&held);
	for (size_t i = 0; i < THREADS; i++)
		CHECK(pthread_create(&threads[i], NULL, sleeper, (void *)i) == 0);
	usleep(200000);
	planted();
	pthread_join(threads[0], NULL);
}
